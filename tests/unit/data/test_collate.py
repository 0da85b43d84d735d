"""Decoding and collating against the slow definition: one row and one column at a time."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.datasets import replace_column, SCHEMA, toy_table, without
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.data.collate import collate
from torchrec_hilomoe.data.decode import decode_block, no_rows
from torchrec_hilomoe.data.layout import ColumnLayout

POSITION = LoaderState(epoch=0, lane_rows=0, num_canonical_shards=1)
TYPES = toy_table(1).schema


def in_range(ids, table):
    return all(id_ is not None and 0 <= id_ < SCHEMA.tables[table] for id_ in ids)


def is_good(row):
    """The definition of a good row, one column at a time."""
    if any(row[name] is None for name in SCHEMA.columns):
        return False
    return (
        all(in_range([row[feature.name]], feature.table) for feature in SCHEMA.candidate)
        and all(in_range(row[field.name], field.table) for field in SCHEMA.sequence_fields)
        and in_range([row["user"]], "user")
        and in_range([row["place"]], "place")
        and in_range(row["tags"], "tag")
        and len(row["clicks_item"]) == len(row["clicks_kind"])
        and all(abs(row[name]) <= float(np.finfo(np.float32).max) for name in SCHEMA.dense)
        and row["label"] in (0, 1)
    )


def expected_row(row):
    """What a good row becomes: key to ids, then the plain columns."""
    ids = {name: [row[name]] for name in ("item", "kind", "user", "place")}
    for group in SCHEMA.sequences:
        end = slice(-group.max_length, None) if group.keep == "last" else slice(group.max_length)
        ids |= {field.name: row[field.name][end] for field in group.fields}
    ids["tags"] = row["tags"][-2:]
    dense = [float(np.float32(row[name])) for name in SCHEMA.dense]
    return ids, dense, float(row["label"]), row["user"], 1.0


def actual_rows(batch):
    keyed = batch.unpooled.to_dict() | batch.pooled.to_dict()
    ids = {key: [row.tolist() for row in jagged.to_dense()] for key, jagged in keyed.items()}
    return [
        ({key: rows[n] for key, rows in ids.items()}, *values)
        for n, values in enumerate(
            zip(
                batch.dense.tolist(),
                batch.labels.tolist(),
                batch.grouping_keys.tolist(),
                batch.weights.tolist(),
                strict=True,
            )
        )
    ]


def ids(table):
    """Mostly good ids, some just outside, some null."""
    return st.one_of(
        st.integers(0, SCHEMA.tables[table] - 1),
        st.integers(0, SCHEMA.tables[table] - 1),
        st.sampled_from([-1, SCHEMA.tables[table], 120, None]),
    )


def good_ids(table, count):
    return st.lists(st.integers(0, SCHEMA.tables[table] - 1), min_size=count, max_size=count)


@st.composite
def rows(draw):
    """A row that is good but for what a few extra draws spoil."""
    clicks, views, tags = (draw(st.integers(0, 6)) for _ in range(3))
    row = {
        "item": draw(st.integers(0, 19)),
        "kind": draw(st.integers(0, 4)),
        "clicks_item": draw(good_ids("item", clicks)),
        "clicks_kind": draw(good_ids("kind", clicks)),
        "views_item": draw(good_ids("item", views)),
        "user": draw(st.integers(0, 999)),
        "place": draw(st.integers(0, 3)),
        "tags": draw(good_ids("tag", tags)),
        "price": draw(st.floats(-1e3, 1e3)),
        "age": draw(st.integers(0, 90)),
        "label": draw(st.integers(0, 1)),
        "unused": "text",
    }
    spoilt = {
        "item": ids("item"),
        "clicks_kind": st.none() | st.lists(ids("kind"), max_size=6),
        "views_item": st.none() | st.lists(ids("item"), max_size=6),
        "user": ids("user"),
        "tags": st.none() | st.lists(ids("tag"), max_size=3),
        "price": st.sampled_from([None, float("nan"), float("inf"), 1e300]),
        "label": st.sampled_from([None, 2, -1]),
    }
    for name in draw(st.lists(st.sampled_from(sorted(spoilt)), max_size=2)):
        row[name] = draw(spoilt[name])
    return row


@settings(deadline=None)
@given(st.lists(rows(), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_matches_the_row_by_row_definition(stored, chunks, data):
    size = -(-len(stored) // chunks)
    parts = [stored[at : at + size] for at in range(0, len(stored), size)]
    table = pa.concat_tables([pa.Table.from_pylist(part, schema=TYPES) for part in parts])
    order = data.draw(st.permutations(range(len(stored))))
    in_order = data.draw(st.booleans())
    block = decode_block(table, ColumnLayout(SCHEMA), None if in_order else np.array(order))
    ordered = stored if in_order else [stored[n] for n in order]
    assert sorted(block.bad) == [n for n, row in enumerate(ordered) if not is_good(row)]

    cut = data.draw(st.integers(0, len(stored)))
    batch = collate(
        ColumnLayout(SCHEMA),
        block.pieces([0, cut, len(stored)]),
        loss_denominator=3.5,
        position=POSITION,
    )
    expected = [expected_row(row) for row in ordered if is_good(row)]
    assert actual_rows(batch) == expected
    assert batch.pooled.stride() == batch.unpooled.stride() == max(1, len(expected))
    histories = [field.name for field in SCHEMA.sequence_fields]
    longest = [max((len(row[0][key]) for key in histories), default=0) for row in expected]
    assert batch.max_seqlen == max([1, *longest])
    assert batch.num_tokens == sum(longest)
    assert (batch.loss_denominator, batch.position) == (3.5, POSITION)


def collated(table, schema=SCHEMA):
    block = decode_block(table, ColumnLayout(schema), None)
    return collate(ColumnLayout(schema), [block.rows], loss_denominator=1.0, position=POSITION)


def test_dtypes_are_what_torchrec_wants():
    batch = collated(toy_table(5))
    for jagged in (batch.pooled, batch.unpooled):
        assert jagged.values().dtype == torch.int64
        assert jagged.lengths().dtype == torch.int32
        assert jagged.stride() == 5
        assert jagged.length_per_key() == jagged.lengths().view(-1, 5).sum(1).tolist()
    assert batch.dense.dtype == batch.labels.dtype == batch.weights.dtype == torch.float32
    assert batch.grouping_keys.dtype == torch.int64


@pytest.mark.parametrize("missing", [("pooled",), ("dense",), ("sequences",), ("pooled", "dense")])
def test_schemas_without_a_kind_of_feature(missing):
    schema = without(SCHEMA, *missing)
    batch = collated(toy_table(5), schema)
    assert tuple(batch.pooled.keys()) == schema.pooled_keys
    assert tuple(batch.unpooled.keys()) == schema.unpooled_keys
    assert batch.pooled.stride() == batch.unpooled.stride() == 5
    assert batch.dense.shape == (5, len(schema.dense))
    assert batch.max_seqlen >= 1


@pytest.mark.parametrize(
    ("column", "values", "fault"),
    [
        ("item", [1, 20, 3], "item has id 20, outside its table's 0 to 19"),
        ("item", [1, None, 3], "item is null"),
        ("views_item", [[1], [2, -7, -8], []], "views_item has id -7, outside its table's 0 to 19"),
        ("views_item", [[1], None, []], "views_item is null"),
        ("views_item", [[1], [3, None], []], "views_item has a null id"),
        ("tags", [[1], [9], []], "tags has id 9, outside its table's 0 to 8"),
        ("price", [0.0, float("nan"), 1.0], "price is nan"),
        ("price", [0.0, 1e300, 1.0], "price is inf"),
        ("label", [0, 2, 1], "label is 2, not 0 or 1"),
        ("user", [0, None, 1], "user is null"),
        ("user", pa.array([0, 2**64 - 1, 1], pa.uint64()), f"user has id {2**64 - 1}, outside"),
    ],
)
def test_tells_what_is_wrong_with_a_row(column, values, fault):
    block = decode_block(
        replace_column(toy_table(3), column, values), ColumnLayout(SCHEMA), np.array([2, 1, 0])
    )
    assert list(block.bad) == [1]
    assert block.bad[1].startswith(f"row 1: {fault}")


def test_tells_which_sequence_group_is_unequal():
    table = replace_column(toy_table(2), "clicks_item", [[1, 2], [3]])
    table = replace_column(table, "clicks_kind", [[1, 2], []])
    table = replace_column(table, "label", [1, 3])
    assert decode_block(table, ColumnLayout(SCHEMA), None).bad == {
        1: "row 1: the fields of sequence group 'clicks' have unequal lengths "
        "(clicks_item 1, clicks_kind 0); label is 3, not 0 or 1"
    }


def test_reads_boolean_and_float_labels():
    for values in (pa.array([True, False]), pa.array([1.0, 0.0], pa.float16())):
        batch = collated(replace_column(toy_table(2), "label", values))
        assert batch.labels.tolist() == [1, 0]
        assert batch.weights.tolist() == [1, 1]


def test_reads_large_lists_and_slices_of_tables():
    table = toy_table(9)
    large = table.column("views_item").cast(pa.large_list(pa.int64()))
    wide = replace_column(table, "views_item", large.combine_chunks())
    assert actual_rows(collated(wide)) == actual_rows(collated(table))
    assert actual_rows(collated(table.slice(3, 4))) == actual_rows(collated(table))[3:7]


@pytest.mark.parametrize("order", [None, np.arange(4)], ids=["stored", "shuffled"])
def test_a_batch_does_not_share_memory_with_its_block(order):
    table = toy_table(4)
    part = decode_block(table, ColumnLayout(SCHEMA), order).rows
    batch = collate(ColumnLayout(SCHEMA), [part], loss_denominator=1.0, position=POSITION)
    batch.unpooled.values().zero_()
    batch.dense.zero_()
    again = collate(ColumnLayout(SCHEMA), [part], loss_denominator=1.0, position=POSITION)
    assert actual_rows(again) == actual_rows(collated(table))


def test_a_batch_may_be_without_rows():
    whole = collated(toy_table(2))
    nothing = collate(
        ColumnLayout(SCHEMA),
        [no_rows(ColumnLayout(SCHEMA))],
        loss_denominator=1.0,
        position=POSITION,
    )
    all_bad = collated(replace_column(toy_table(2), "label", [7, 8]))
    for batch in (nothing, all_bad):
        assert actual_rows(batch) == []
        assert (batch.max_seqlen, batch.num_tokens) == (1, 0)
        for jagged, like in ((batch.pooled, whole.pooled), (batch.unpooled, whole.unpooled)):
            assert jagged.keys() == like.keys()
            assert jagged.stride() == 1
            assert jagged.values().dtype == like.values().dtype
            assert jagged.lengths().dtype == like.lengths().dtype
            assert jagged.length_per_key() == [0] * len(like.keys())
        for name in ("dense", "labels", "weights", "grouping_keys"):
            tensor, other = getattr(batch, name), getattr(whole, name)
            assert (tensor.dtype, tensor.shape) == (other.dtype, (0, *other.shape[1:])), name


def test_a_shorter_schema_cuts_further():
    shorter = replace(
        SCHEMA, sequences=tuple(replace(group, max_length=1) for group in SCHEMA.sequences)
    )
    batch = collated(toy_table(30), shorter)
    assert batch.max_seqlen == 1
    last = [row[-1:] for row in toy_table(30).column("clicks_item").to_pylist()]
    assert [ids.tolist() for ids in batch.unpooled["clicks_item"].to_dense()] == last
