"""Times of events and requests, and weights of rows: from columns to batches."""

import re
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from tests.helpers.datasets import replace_column, SCHEMA, TableSource, toy_table
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import check_columns

CLICKS, VIEWS = SCHEMA.sequences
TIMED = replace(
    SCHEMA,
    sequences=(replace(CLICKS, time="clicks_time"), replace(VIEWS, time="views_time")),
    time="time",
    weight="weight",
)
ROWS = 11


def timed_table(rows: int = ROWS) -> pa.Table:
    """Rows whose events happened at moments that no two events share."""
    table, moment = toy_table(rows), iter(range(1 << 33, 1 << 34))
    for name in ("clicks", "views"):
        times = [[next(moment) for _ in ids] for ids in table[f"{name}_item"].to_pylist()]
        table = table.append_column(f"{name}_time", pa.array(times, pa.list_(pa.int64())))
    table = table.append_column("time", pa.array([7 * row for row in range(rows)], pa.int64()))
    return table.append_column("weight", pa.array([(1 + row) / 4 for row in range(rows)]))


def batches(table: pa.Table, **options):
    return list(Loader(TableSource((table,), TIMED), batch_size=4, prefetch=0, **options))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_keeps_its_times_and_weight(shuffle):
    table = timed_table()
    stored = {row["user"]: row for row in table.to_pylist()}
    seen = 0
    for batch in batches(table, shuffle=shuffle, epochs=1):
        assert batch.time is not None
        lengths = [batch.unpooled[f"{name}_item"].lengths() for name in ("clicks", "views")]
        events = [
            times.split(length.tolist()) for times, length in zip(batch.times, lengths, strict=True)
        ]
        for at, user in enumerate(batch.grouping_keys.tolist()):
            row = stored[user]
            assert events[0][at].tolist() == row["clicks_time"][-CLICKS.max_length :]
            assert events[1][at].tolist() == row["views_time"][: VIEWS.max_length]
            assert (int(batch.time[at]), float(batch.weights[at])) == (row["time"], row["weight"])
            seen += 1
    assert seen == ROWS


def test_a_schema_without_times_gives_none():
    batch = next(iter(Loader(TableSource((toy_table(4),)), batch_size=4, prefetch=0)))
    assert batch.time is None
    assert batch.times == ()
    assert torch.equal(batch.weights, torch.ones(4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clicks_time", [5] * 9, "'clicks' have unequal lengths .*clicks_time 9"),
        ("views_time", None, "views_time is null"),
        ("time", None, "time is null"),
        ("weight", -0.5, "weight is -0.5, which is below 0"),
        ("weight", float("nan"), "weight is nan"),
    ],
)
def test_rows_with_bad_times_and_weights_are_reported_and_left_out(name, value, message, caplog):
    table = timed_table()
    values = table[name].to_pylist()
    values[6] = value
    found = batches(replace_column(table, name, values), shuffle=False, epochs=1)
    assert re.match(f"block 0, row 6: .*{message}", caplog.messages[0])
    good = set(range(ROWS)) - {6}
    times = torch.cat([batch.time for batch in found if batch.time is not None])
    assert sorted(times.tolist()) == [7 * row for row in good]
    weights = torch.cat([batch.weights for batch in found])
    assert sorted(weights.tolist()) == [(1 + row) / 4 for row in good]
    lengths = torch.cat([batch.unpooled["clicks_item"].lengths() for batch in found])
    assert sum(len(batch.times[0]) for batch in found) == int(lengths.sum())


def tensors_of(batch):
    jagged = (batch.pooled, batch.unpooled)
    flat = [tensor for ids in jagged for tensor in (ids.values(), ids.lengths())]
    return [
        *flat,
        batch.dense,
        batch.labels,
        batch.weights,
        batch.grouping_keys,
        batch.time,
        *batch.times,
    ]


@pytest.mark.parametrize("bucket_by_length", [0, 2])
@pytest.mark.parametrize("nowhere", [{3}, {0, 1, 10}, set(range(ROWS))], ids=str)
def test_rows_of_weight_zero_leave_no_trace_whatever_is_in_them(nowhere, bucket_by_length):
    """To the bit; among those left out are the longest histories."""
    table = timed_table()
    weights = [0.0 if row in nowhere else (1 + row) / 4 for row in range(ROWS)]
    options = {"epochs": 1, "shuffle": False, "bucket_by_length": bucket_by_length}
    found = batches(replace_column(table, "weight", weights), **options)
    whole = batches(table, **options)
    assert [batch.position for batch in found] == [batch.position for batch in whole]
    for batch, with_all in zip(found, whole, strict=True):
        rows = [int(user) for user in with_all.grouping_keys if int(user) not in nowhere]
        assert batch.grouping_keys.tolist() == rows
        assert batch.loss_denominator == with_all.loss_denominator
        if rows:
            (alone,) = list(
                Loader(
                    TableSource((table.take(rows),), TIMED),
                    batch_size=len(rows),
                    shuffle=False,
                    epochs=1,
                    prefetch=0,
                    start=LoaderState(epoch=0, lane_rows=0, num_canonical_shards=1),
                )
            )
            for got, want in zip(tensors_of(batch), tensors_of(alone), strict=True):
                assert (got.dtype, got.tolist()) == (want.dtype, want.tolist())
            assert (batch.max_seqlen, batch.num_tokens) == (alone.max_seqlen, alone.num_tokens)


def test_types_that_cannot_hold_times_are_refused_before_reading():
    table = replace_column(timed_table(), "time", pa.array([0.5] * ROWS))
    table = replace_column(table, "clicks_time", pa.array([3] * ROWS))
    with pytest.raises(DataError, match="'time' is double, the schema wants an integer"):
        check_columns(table.schema, TIMED, "file")
    with pytest.raises(DataError, match="'clicks_time' is int64, the schema wants a list"):
        check_columns(table.schema, TIMED, "file")


def test_times_move_with_the_batch():
    batch = batches(timed_table(), epochs=1)[0].to(torch.device("meta"))
    assert batch.time is not None
    assert batch.time.is_meta
    assert all(times.is_meta for times in batch.times)
