"""Criteo's display advertisements: 13 counts and 26 fields, whose meanings are not published.

It reads ``train.txt`` of the original challenge, whose rows are in the order of time: the last ones
test, those before them validate. Or it reads files ``train.csv``, ``valid.csv`` and ``test.csv``
with a header (``label``, ``I1`` to ``I13``, ``C1`` to ``C26``), as benchmarks have split them.

There is no history and no user: ``C1`` stands as the candidate, the other fields are the context,
and GAUC has one group, so that it is AUC.
"""

from typing import Unpack

import polars as pl

from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, HoldOut, Inputs
from torchrec_hilomoe.data.prepare.folder import Report, vocabulary_file
from torchrec_hilomoe.data.prepare.options import check_least, Common
from torchrec_hilomoe.data.prepare.records import find_raw
from torchrec_hilomoe.data.prepare.sources import CsvFile
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, VocabularyRule
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["criteo_schema", "prepare_criteo"]

SOURCE = (
    "Get the Kaggle Display Advertising Challenge data set (train.txt) from Criteo, and name its "
    "folder with --raw."
)
NUMBERS = tuple(f"I{number}" for number in range(1, 14))
FIELDS = tuple(f"C{number}" for number in range(1, 27))
SPLITS = ("train", "valid", "test")


def criteo_schema(tables: dict[str, int] | None = None, *, min_count: int = 10) -> Schema:
    """Return the columns.

    Args:
        tables: Sizes, by field; they are in the report of a prepared folder.
        min_count: Rarer values are unknown.
    """
    sizes = tables or dict.fromkeys(FIELDS, 2)
    return Schema(
        dataset="criteo",
        tables={name: sizes[name] for name in FIELDS},
        candidate=(IdFeature(name=FIELDS[0], table=FIELDS[0]),),
        pooled=tuple(PooledFeature(name=name, table=name) for name in FIELDS[1:]),
        dense=NUMBERS,
        group="group",
        vocabularies={
            name: VocabularyRule(
                kind="counted", min_count=min_count, unknown="last", file=vocabulary_file(name)
            )
            for name in FIELDS
        },
    )


def prepare_criteo(
    *,
    raw: str,
    min_count: int = 10,
    valid_percent: int = 10,
    test_percent: int = 10,
    **common: Unpack[Common],
) -> Report:
    """Prepare Criteo's display advertisements: predict whether one is clicked.

    Args:
        raw: Folder with train.txt, or with train.csv, valid.csv and test.csv; plain or .gz.
        min_count: Values of a field that are rarer in training rows are unknown.
        valid_percent: How many of a hundred rows of train.txt, near its end, validate.
        test_percent: How many of a hundred rows of train.txt, at its end, test.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    check_least(1, min_count=min_count)
    mapping = ColumnMapping(
        schema=criteo_schema(min_count=min_count),
        text=frozenset(FIELDS),
        missing_dense=0.0,
        constants={"group": 0},
        dense=_squeezed,
    )
    return prepare_tables(
        _inputs(raw),
        mapping,
        hold_out=HoldOut(valid_percent=valid_percent, test_percent=test_percent, by="tail"),
        named={"min_count": min_count},
        **common,
    )


def _inputs(raw: str) -> Inputs:
    if path_manager.isfile(f"{raw}/train.csv") or path_manager.isfile(f"{raw}/train.csv.gz"):
        files = [CsvFile(find_raw(raw, f"{split}.csv", SOURCE), source=SOURCE) for split in SPLITS]
        return Inputs(train=(files[0],), valid=(files[1],), test=(files[2],))
    path = find_raw(raw, "train.txt", SOURCE)
    names = ("label", *NUMBERS, *FIELDS)
    return Inputs(train=(CsvFile(path, names=names, separator="\t", source=SOURCE),))


def _squeezed(counts: pl.Expr) -> pl.Expr:
    """Return log(1 + x); the few negative counts are as good as none."""
    return counts.cast(pl.Float64).clip(0).log1p().cast(pl.Float32)
