"""Mutated files end in a clear error or a counted skip: never a crash, a hang or a wrong batch."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.datasets import replace_column, row_ids, SCHEMA, toy_table, write_folder
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource

ROWS = 39
LISTS = [*(field.name for field in SCHEMA.sequence_fields), "tags"]
WAYS = st.sampled_from([(0, 0), (2, 2)])  # workers, prefetch


def epoch(folder, ways=(0, 0), **changed):
    """Every batch of one epoch of a folder, read in one of the ways."""
    workers, prefetch = ways
    options: dict[str, Any] = {"max_bad_rows": ROWS, "block_bytes": 1} | changed
    source = ParquetSource(str(folder), "train", block_bytes=options.pop("block_bytes"))
    return list(
        Loader(source, batch_size=8, epochs=1, workers=workers, prefetch=prefetch, **options)
    )


def assert_safe(batches):
    """Every id is inside its table, candidates are single, parallel fields have equal lengths."""
    for batch in batches:
        for feature in SCHEMA.id_features:
            jagged = batch.pooled if feature.name in SCHEMA.pooled_keys else batch.unpooled
            ids = jagged[feature.name].values()
            assert not ids.numel() or 0 <= int(ids.min()) <= int(ids.max())
            assert not ids.numel() or int(ids.max()) < SCHEMA.tables[feature.table]
        lengths = [
            batch.unpooled[name].lengths().tolist() for name in ("clicks_item", "clicks_kind")
        ]
        assert lengths[0] == lengths[1]
        assert batch.dense.isfinite().all()
        assert set(batch.labels.tolist()) <= {0.0, 1.0}
    assert sum(batch.loss_denominator for batch in batches) == ROWS
    ids = [row for batch in batches for row in row_ids(batch)]
    assert len(ids) == len(set(ids))
    return ids


NUMBERS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**62]),
)
FLOATS = st.none() | st.floats(width=64)
TYPES: dict[str, tuple[pa.DataType, Any]] = {
    "int64": (pa.int64(), NUMBERS),
    "uint64": (pa.uint64(), st.none() | st.integers(0, 2**64 - 1)),
    "uint8": (pa.uint8(), st.none() | st.integers(0, 255)),
    "int8": (pa.int8(), st.none() | st.integers(-128, 127)),
    "double": (pa.float64(), FLOATS),
    "boolean": (pa.bool_(), st.none() | st.booleans()),
    "text": (pa.string(), st.none() | st.text(max_size=3)),
    "moments": (pa.timestamp("us"), st.none() | st.integers(0, 2**40)),
    "nothing": (pa.null(), st.none()),
    "lists": (pa.list_(pa.int64()), st.none() | st.lists(NUMBERS, max_size=5)),
    "large lists": (pa.large_list(pa.int32()), st.lists(st.integers(-1, 6), max_size=5)),
    "lists of uint64": (
        pa.list_(pa.uint64()),
        st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=3),
    ),
    "lists of lists": (pa.list_(pa.list_(pa.int64())), st.none() | st.just([[1], []])),
    "lists of double": (pa.list_(pa.float64()), st.none() | st.lists(FLOATS, max_size=3)),
    "pairs": (pa.list_(pa.int64(), 2), st.just([1, 1])),
}


def fits(name, stored):
    """Whether a column of this type can hold the schema's."""
    if name in LISTS:
        many = pa.types.is_list(stored) or pa.types.is_large_list(stored)
        return many and pa.types.is_integer(stored.value_type)
    if name in (*SCHEMA.dense, SCHEMA.label):
        return pa.types.is_integer(stored) or stored in (pa.float64(), pa.bool_())
    return pa.types.is_integer(stored)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(SCHEMA.columns) - {"user"})),
    st.sampled_from(sorted(TYPES)),
    WAYS,
    st.data(),
)
def test_a_column_of_any_type_and_values(tmp_path_factory, name, kind, ways, data):
    stored, values = TYPES[kind]
    column = pa.array(data.draw(st.lists(values, min_size=ROWS, max_size=ROWS)), stored)
    table = replace_column(toy_table(ROWS), name, column)
    folder = write_folder(tmp_path_factory.mktemp("fuzz"), {"train": [table]})
    if fits(name, stored):
        assert_safe(epoch(folder, ways))
    else:
        with pytest.raises(DataError, match=rf"part-00000\.parquet: column '{name}' is "):
            epoch(folder, ways)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True), WAYS)
def test_a_file_cut_off_anywhere(tmp_path_factory, kept, ways):
    tables = [toy_table(20), toy_table(19, first=20)]
    folder = write_folder(tmp_path_factory.mktemp("fuzz"), {"train": tables})
    path = folder / "train" / "part-00001.parquet"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises(DataError, match=r"part-00001\.parquet is not a whole Parquet file"):
        epoch(folder, ways)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 7), st.integers(0, 5), WAYS)
def test_empty_files_and_any_cut_into_row_groups(tmp_path_factory, sizes, group, bytes_, ways):
    borders = [0, *np.minimum(np.cumsum(sizes), ROWS).tolist(), ROWS]
    whole = toy_table(ROWS)
    tables = [whole.slice(a, b - a) for a, b in zip(borders, borders[1:], strict=False)]
    folder = write_folder(tmp_path_factory.mktemp("fuzz"), {"train": tables}, row_group_size=group)
    assert sorted(assert_safe(epoch(folder, ways, block_bytes=bytes_ * 300))) == list(range(ROWS))


def test_rows_without_any_event(tmp_path):
    table = toy_table(ROWS)
    for name in LISTS:
        table = replace_column(table, name, [[] for _ in range(ROWS)])
    batches = epoch(write_folder(tmp_path / "set", {"train": [table]}))
    assert sorted(assert_safe(batches)) == list(range(ROWS))
    assert {batch.max_seqlen for batch in batches} == {1}
