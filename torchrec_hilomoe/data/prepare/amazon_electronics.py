"""AmazonElectronics_x1: which of two items a user buys next, the other one drawn at random.

The user is only the group of GAUC. Histories are cut to their first 100 events, as the benchmark
does. ``test.csv`` has each user's last purchase; whole users of ``train.csv`` validate, since a
user is no feature and the rows of one are nearly alike.
"""

from typing import Unpack

from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, counted, csv_inputs, HoldOut
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

__all__ = ["amazon_electronics_schema", "prepare_amazon_electronics"]

SOURCE = (
    "Get train.csv and test.csv of AmazonElectronics_x1 from "
    "https://github.com/reczoo/Datasets, and name their folder with --raw."
)


def amazon_electronics_schema(
    *, items: int = 63_003, categories: int = 803, max_history: int = 100
) -> Schema:
    """Return the columns; the sizes are those of the public files."""
    return Schema(
        dataset="amazon-electronics",
        tables={"item": items, "category": categories},
        candidate=(
            IdFeature(name="item_id", table="item"),
            IdFeature(name="cate_id", table="category"),
        ),
        sequences=(
            SequenceGroup(
                name="history",
                fields=(
                    IdFeature(name="item_history", table="item"),
                    IdFeature(name="cate_history", table="category"),
                ),
                max_length=max_history,
                keep="first",
            ),
        ),
        group="user_id",
        vocabularies={table: counted(table, 1) for table in ("item", "category")},
    )


def prepare_amazon_electronics(
    *,
    raw: str,
    max_history: int = 100,
    valid_percent: int = 5,
    **common: Unpack[Common],
) -> Report:
    """Prepare AmazonElectronics_x1: tell a user's next item from a random one.

    Args:
        raw: Folder with train.csv and test.csv, each plain or gzipped (.gz).
        max_history: How many of the user's first items a row keeps; a run can cut further.
        valid_percent: About how many of a hundred users of train.csv validate.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    schema = amazon_electronics_schema(max_history=max_history)
    return prepare_tables(
        csv_inputs(raw, source=SOURCE),
        ColumnMapping(schema=schema),
        hold_out=HoldOut(valid_percent=valid_percent, by="group"),
        **common,
    )
