"""TaobaoAd_x1: whether a user clicks an advertisement, after what they did in the shop.

It reads the benchmark's ``train.csv`` and ``test.csv``, or the layout that those were made from:
no header and 267 fields, of which the first 150 are histories of 50 events, 0 where there is none.
Events without a brand, say, have left the lists of brands shorter: as in the benchmark the last
entries of the lists belong together, and the brands that lack are unknown.

The files tell no times, so a random share of the rows of ``train.csv`` validates.
"""

from typing import Unpack

import polars as pl

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, counted, HoldOut, Inputs
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.records import find_raw
from torchrec_hilomoe.data.prepare.sources import CsvFile, MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, SequenceGroup

__all__ = ["prepare_taobao_ad", "taobao_ad_schema"]

SOURCE = (
    "Get train.csv and test.csv of TaobaoAd_x1 from https://github.com/reczoo/Datasets, and name "
    "their folder with --raw; --train and --test name files of the raw layout."
)
MIN_COUNT = 10
HISTORY = 50
# What an advertisement is, and what is known of the user and the place; each has its own table.
CANDIDATE = {
    "adgroup_id": 246_851,
    "cate_id": 11_330,
    "campaign_id": 191_771,
    "customer": 132_136,
    "brand": 308_870,
    "btag": 6,
}
CONTEXT = {
    "userid": 403_958,
    "cms_segid": 99,
    "cms_group_id": 15,
    "final_gender_code": 4,
    "age_level": 9,
    "pvalue_level": 6,
    "shopping_level": 5,
    "occupation": 4,
    "new_user_class_level": 7,
    "pid": 4,
}
SEQUENCES = {"cate_his": "cate_id", "brand_his": "brand", "btag_his": "btag"}
RAW = {"label": "clk", "group": "userid"}
# The raw layout: where the histories begin, and which field is which column.
RAW_FIELDS = 267
RAW_HISTORIES = {"btag_his": 0, "cate_his": 50, "brand_his": 100}
RAW_COLUMNS = {
    "userid": 250,
    "cms_segid": 251,
    "cms_group_id": 252,
    "final_gender_code": 253,
    "age_level": 254,
    "pvalue_level": 255,
    "shopping_level": 256,
    "occupation": 257,
    "new_user_class_level": 258,
    "adgroup_id": 259,
    "cate_id": 260,
    "campaign_id": 261,
    "customer": 262,
    "brand": 263,
    "price": 264,
    "pid": 265,
    "clk": 266,
}


def taobao_ad_schema(*, tables: dict[str, int] | None = None, max_history: int = HISTORY) -> Schema:
    """Return the columns.

    Args:
        tables: Sizes, by column; by default those of the public files.
        max_history: Events of a history.
    """
    sizes = tables or {**CANDIDATE, **CONTEXT}
    return Schema(
        dataset="taobao-ad",
        tables={name: sizes[name] for name in (*CANDIDATE, *CONTEXT)},
        candidate=tuple(IdFeature(name=name, table=name) for name in CANDIDATE),
        sequences=(
            SequenceGroup(
                name="history",
                fields=tuple(IdFeature(name=name, table=SEQUENCES[name]) for name in SEQUENCES),
                max_length=max_history,
            ),
        ),
        pooled=tuple(PooledFeature(name=name, table=name) for name in CONTEXT),
        dense=("price",),
        group="group",
        vocabularies={name: counted(name, MIN_COUNT) for name in sizes},
    )


def prepare_taobao_ad(
    *,
    raw: str,
    train: str = "train.csv",
    test: str = "test.csv",
    max_history: int = HISTORY,
    valid_percent: int = 5,
    **common: Unpack[Common],
) -> Report:
    """Prepare TaobaoAd_x1: predict whether a user clicks an advertisement.

    Args:
        raw: Folder with the two files, each plain or gzipped (.gz).
        train: Name of the training file, of the benchmark or in the raw layout.
        test: Name of the test file.
        max_history: How many of the user's last events a row keeps; a run can cut further.
        valid_percent: About how many of a hundred rows of the training file validate.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    paths = [find_raw(raw, name, SOURCE) for name in (train, test)]
    layouts = {_is_raw_layout(path) for path in paths}
    if len(layouts) > 1:
        raise DataError(
            f"of {paths[0]} and {paths[1]} one has a header and one is in the raw layout of "
            f"{RAW_FIELDS} fields; give two of a kind with --train and --test."
        )
    (raw_layout,) = layouts
    names = [f"f{number}" for number in range(RAW_FIELDS)] if raw_layout else []
    files = [CsvFile(path, names=names, source=SOURCE) for path in paths]
    mapping = ColumnMapping(
        schema=taobao_ad_schema(max_history=max_history),
        raw=RAW,
        align=True,
        reshape=_from_raw_layout if raw_layout else None,
        reads=_raw_fields() if raw_layout else None,
    )
    return prepare_tables(
        Inputs(train=(files[0],), test=(files[1],)),
        mapping,
        hold_out=HoldOut(valid_percent=valid_percent, by="rows"),
        **common,
    )


def _is_raw_layout(path: str) -> bool:
    return len(CsvFile(path, source=SOURCE).columns()) == RAW_FIELDS


def _raw_fields() -> tuple[str, ...]:
    histories = [start + step for start in RAW_HISTORIES.values() for step in range(HISTORY)]
    return tuple(f"f{number}" for number in (*histories, *RAW_COLUMNS.values()))


def _from_raw_layout(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Make the benchmark's columns of 267 fields; a missing value is 0, a missing event is none."""
    columns = {name: pl.col(f"f{place}").fill_null("0") for name, place in RAW_COLUMNS.items()}
    for name, start in RAW_HISTORIES.items():
        events = [pl.col(f"f{start + step}") for step in range(HISTORY)]
        there = [pl.when(event != "0").then(event) for event in events]
        columns[name] = pl.concat_str(there, separator="^", ignore_nulls=True)
    columns["btag"] = pl.lit("1")
    return rows.select(ROW, PLACE, MALFORMED, **columns)
