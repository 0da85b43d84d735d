"""KuaiVideo_x1: whether a user clicks a short video, after those clicked and those passed over.

Each video has an id, if it occurs ten times, and a frozen vector of its cover. The latest rows of
``train.csv`` validate. The file's times are scrambled but in order.
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

__all__ = ["kuaivideo_schema", "prepare_kuaivideo"]

SOURCE = (
    "Get train.csv, test.csv and item_visual_emb_dim64.h5 of KuaiVideo_x1 from "
    "https://github.com/reczoo/Datasets, and name their folder with --raw."
)
VECTORS = "item_visual_emb_dim64.h5"
MIN_COUNT = 10
RAW = {
    "item_emb": "item_id",
    "pos_items_emb": "pos_items",
    "neg_items_emb": "neg_items",
    "label": "is_click",
    "group": "user_id",
}


def kuaivideo_schema(
    *,
    users: int = 10_002,
    items: int = 632_406,
    covers: int = 3_242_317,
    width: int = 64,
    max_history: int = 100,
) -> Schema:
    """Return the columns; the sizes are those of the public files."""
    return Schema(
        dataset="kuaivideo",
        tables={"item": items, "item_emb": covers, "user": users},
        candidate=(
            IdFeature(name="item_id", table="item"),
            IdFeature(name="item_emb", table="item_emb"),
        ),
        sequences=tuple(
            SequenceGroup(
                name=name,
                fields=(
                    IdFeature(name=name, table="item"),
                    IdFeature(name=f"{name}_emb", table="item_emb"),
                ),
                max_length=max_history,
            )
            for name in ("pos_items", "neg_items")
        ),
        pooled=(PooledFeature(name="user_id", table="user"),),
        group="group",
        time="timestamp",
        frozen={"item_emb": FrozenTable(width=width, file=vectors_file("item_emb"))},
        vocabularies={
            "item": counted("item", MIN_COUNT),
            "item_emb": VocabularyRule(
                kind="given", unknown="last", file=vocabulary_file("item_emb")
            ),
            "user": counted("user", MIN_COUNT),
        },
    )


def prepare_kuaivideo(
    *,
    raw: str,
    max_history: int = 100,
    valid_percent: int = 5,
    **common: Unpack[Common],
) -> Report:
    """Prepare KuaiVideo_x1: predict whether a user clicks a video.

    Args:
        raw: Folder with train.csv, test.csv (plain or .gz) and item_visual_emb_dim64.h5.
        max_history: How many of the user's last videos of each kind a row keeps.
        valid_percent: About how many of a hundred rows of train.csv, the latest, validate.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    vectors = Vectors(find_raw(raw, VECTORS, SOURCE))
    schema = kuaivideo_schema(width=vectors.width, max_history=max_history)
    return prepare_tables(
        csv_inputs(raw, source=SOURCE),
        ColumnMapping(schema=schema, raw=RAW, given={"item_emb": vectors.keys}),
        hold_out=HoldOut(valid_percent=valid_percent, by="time"),
        vectors={"item_emb": vectors},
        **common,
    )
