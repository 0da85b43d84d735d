"""The log of the RecSys Challenge 2019: which of the hotels shown does a user click on?

Each "clickout item" with its list of impressions is a request: a row for every hotel shown, of
which one is a click. The history is the user's earlier actions on hotels, each with its kind. The
split is by time, and GAUC groups the rows of a request.
"""

from typing import Unpack

from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import prepare_log
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.trivago_log import Sessions

__all__ = ["prepare_trivago"]


def prepare_trivago(
    *,
    raw: str,
    max_history: int = 50,
    **common: Unpack[Common],
) -> Report:
    """Prepare trivago's sessions: predict which hotel of a list is clicked.

    Args:
        raw: Folder with sessions.parquet.
        max_history: How many of the user's last actions a row keeps; a run can cut further.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If the raw file is missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda scratch, _: Sessions(raw, max_history, scratch),
        lengths={"max_history": max_history},
        **common,
    )
