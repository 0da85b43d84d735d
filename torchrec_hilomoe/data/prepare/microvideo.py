"""MicroVideo1.7M_x1: whether a user clicks a video that nobody has seen before.

A video is its cover's frozen vector and its category. The latest rows of ``train.csv`` validate.
"""

from typing import Unpack

from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, counted, csv_inputs, HoldOut
from torchrec_hilomoe.data.prepare.folder import Report, vectors_file, vocabulary_file
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.records import find_raw
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.prepare.vectors import Vectors
from torchrec_hilomoe.data.schema import (
    FrozenTable,
    IdFeature,
    PooledFeature,
    Schema,
    SequenceGroup,
    VocabularyRule,
)

__all__ = ["microvideo_schema", "prepare_microvideo"]

SOURCE = (
    "Get train.csv, test.csv and item_image_emb_dim64.h5 of MicroVideo1.7M_x1 from "
    "https://github.com/reczoo/Datasets, and name their folder with --raw."
)
VECTORS = "item_image_emb_dim64.h5"
RAW = {"label": "is_click", "group": "user_id"}


def microvideo_schema(
    *,
    users: int = 10_988,
    items: int = 1_704_882,
    categories: int = 514,
    width: int = 64,
    max_history: int = 100,
) -> Schema:
    """Return the columns; the sizes are those of the public files."""
    return Schema(
        dataset="microvideo",
        tables={"item": items, "category": categories, "user": users},
        candidate=(
            IdFeature(name="item_id", table="item"),
            IdFeature(name="cate_id", table="category"),
        ),
        sequences=(
            SequenceGroup(
                name="clicks",
                fields=(
                    IdFeature(name="clicked_items", table="item"),
                    IdFeature(name="clicked_categories", table="category"),
                ),
                max_length=max_history,
            ),
        ),
        pooled=(PooledFeature(name="user_id", table="user"),),
        group="group",
        time="timestamp",
        frozen={"item": FrozenTable(width=width, file=vectors_file("item"))},
        vocabularies={
            "item": VocabularyRule(kind="given", unknown="last", file=vocabulary_file("item")),
            "category": counted("category", 1),
            "user": counted("user", 1),
        },
    )


def prepare_microvideo(
    *,
    raw: str,
    max_history: int = 100,
    valid_percent: int = 5,
    **common: Unpack[Common],
) -> Report:
    """Prepare MicroVideo1.7M_x1: predict whether a user clicks a new video.

    Args:
        raw: Folder with train.csv, test.csv (plain or .gz) and item_image_emb_dim64.h5.
        max_history: How many of the user's last videos a row keeps; a run can cut further.
        valid_percent: About how many of a hundred rows of train.csv, the latest, validate.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    vectors = Vectors(find_raw(raw, VECTORS, SOURCE))
    schema = microvideo_schema(width=vectors.width, max_history=max_history)
    return prepare_tables(
        csv_inputs(raw, source=SOURCE),
        ColumnMapping(schema=schema, raw=RAW, given={"item": vectors.keys}),
        hold_out=HoldOut(valid_percent=valid_percent, by="time"),
        vectors={"item": vectors},
        **common,
    )
