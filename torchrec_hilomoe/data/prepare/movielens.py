"""MovieLens-1M: a click is a rating of four stars or more.

The history is what the user rated before, movie by movie, with genres and stars. Each user's
ratings are cut in the order of time: the first 80 % train, the next 10 % validate, the last
10 % test. Everything in a row but its label is known before the rating is given.
"""

from typing import Unpack

from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import prepare_log
from torchrec_hilomoe.data.prepare.movielens_log import Lengths, Ratings
from torchrec_hilomoe.data.prepare.options import Common

__all__ = ["prepare_movielens"]


def prepare_movielens(
    *,
    raw: str,
    max_history: int = 50,
    max_liked: int = 100,
    **common: Unpack[Common],
) -> Report:
    """Prepare MovieLens-1M: predict whether a user gives a movie four stars or more.

    Args:
        raw: Folder with ratings.dat, movies.dat and users.dat, each plain or gzipped (.gz).
        max_history: How many of the user's last ratings a row keeps; a run can cut further.
        max_liked: How many of the user's last liked movies a row keeps, as a bag.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda *_: Ratings(raw, Lengths(history=max_history, liked=max_liked)),
        lengths={"max_history": max_history, "max_liked": max_liked},
        **common,
    )
