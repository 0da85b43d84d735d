"""Small data sets with every kind of column, in memory and as prepared folders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.parquet import SUCCESS_FILE
from torchrec_hilomoe.data.schema import (
    IdFeature,
    PooledFeature,
    Schema,
    SCHEMA_FILE,
    SequenceGroup,
)
from torchrec_hilomoe.data.source import BlockSource

USERS = 1000

SCHEMA = Schema(
    dataset="toy",
    tables={"item": 20, "kind": 5, "place": 4, "user": USERS, "tag": 9},
    candidate=(IdFeature(name="item", table="item"), IdFeature(name="kind", table="kind")),
    sequences=(
        SequenceGroup(
            name="clicks",
            fields=(
                IdFeature(name="clicks_item", table="item"),
                IdFeature(name="clicks_kind", table="kind"),
            ),
            max_length=4,
        ),
        SequenceGroup(
            name="views",
            fields=(IdFeature(name="views_item", table="item"),),
            max_length=3,
            keep="first",
        ),
    ),
    pooled=(
        PooledFeature(name="user", table="user"),
        PooledFeature(name="place", table="place"),
        PooledFeature(name="tags", table="tag", max_length=2),
    ),
    dense=("price", "age"),
)


@dataclass(frozen=True)
class TableSource(BlockSource):
    """Blocks that are in memory already."""

    blocks: tuple[pa.Table, ...]
    meaning: Schema = SCHEMA

    @property
    def schema(self) -> Schema:
        return self.meaning

    @property
    def block_rows(self) -> tuple[int, ...]:
        return tuple(block.num_rows for block in self.blocks)

    def describe(self, block: int) -> str:
        return f"block {block}"

    def read(self, epoch: int, block: int) -> pa.Table:
        return self.blocks[block]


# BARS's AmazonElectronics_x1, with its vocabularies: what published sizes are of.
AMAZON = Schema(
    dataset="AmazonElectronics_x1",
    tables={"item": 63_003, "category": 803},
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
            max_length=100,
        ),
    ),
    group="user_id",
)


def toy_table(rows: int, *, seed: int = 0, first: int = 0) -> pa.Table:
    """``rows`` good rows; the column ``user`` numbers them from ``first``."""
    rng = np.random.default_rng(seed)

    def ids(table: str, count: int) -> list[int]:
        return rng.integers(0, SCHEMA.tables[table], size=count).tolist()

    def lists(table: str, counts: Sequence[int]) -> pa.Array:
        return pa.array([ids(table, count) for count in counts], pa.list_(pa.int32()))

    clicks, views, tags = rng.integers(0, 7, size=(3, rows)).tolist()
    return pa.table(
        {
            "item": pa.array(ids("item", rows), pa.int32()),
            "kind": pa.array(ids("kind", rows), pa.int64()),
            "clicks_item": lists("item", clicks),
            "clicks_kind": lists("kind", clicks),
            "views_item": lists("item", views),
            "user": pa.array(range(first, first + rows), pa.int64()),
            "place": pa.array(ids("place", rows), pa.int8()),
            "tags": lists("tag", tags),
            "price": pa.array(rng.normal(size=rows), pa.float64()),
            "age": pa.array(rng.integers(0, 90, size=rows), pa.int16()),
            "label": pa.array(rng.integers(0, 2, size=rows), pa.int8()),
            "unused": pa.array(["text"] * rows, pa.string()),
        }
    )


def toy_source(*block_rows: int) -> TableSource:
    """Blocks of the given sizes, whose rows are numbered through."""
    firsts = np.cumsum([0, *block_rows]).tolist()
    return TableSource(
        tuple(
            toy_table(rows, seed=index, first=first)
            for index, (rows, first) in enumerate(zip(block_rows, firsts, strict=False))
        )
    )


def replace_column(table: pa.Table, name: str, values: list | pa.Array) -> pa.Table:
    """The same table with other values, of the same type unless they bring their own."""
    index = table.column_names.index(name)
    typed = isinstance(values, pa.Array)
    column = values if typed else pa.array(values, table.schema.field(name).type)
    return table.set_column(index, name, column)


def write_folder(
    folder: Path, splits: dict[str, list[pa.Table]], *, row_group_size: int = 10
) -> Path:
    """Write a whole prepared folder, one file a table."""
    for split, tables in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, table in enumerate(tables):
            pq.write_table(
                table,
                folder / split / f"part-{index:05d}.parquet",
                row_group_size=row_group_size,
                write_page_checksum=True,
            )
    SCHEMA.save(str(folder / SCHEMA_FILE))
    (folder / SUCCESS_FILE).touch()
    return folder


def row_ids(batch: CTRBatch) -> list[int]:
    """Which rows a batch has, by the numbers that :func:`toy_table` gave them."""
    return batch.grouping_keys[batch.weights > 0].tolist()


def without(schema: Schema, *parts: str) -> Schema:
    """A schema without some of its kinds of features."""
    return replace(schema, **dict.fromkeys(parts, ()))
