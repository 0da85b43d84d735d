"""Loader: the same global batches on any number of ranks, every row once, exact positions."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.datasets import (
    replace_column,
    row_ids,
    SCHEMA,
    TableSource,
    toy_source,
    toy_table,
)
from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.runtime.world import World

SOURCE = toy_source(13, 1, 0, 30, 22, 7)  # 73 rows: no batch size below divides them
ROWS = sum(SOURCE.block_rows)


def batches(world_size, **changed):
    """One epoch's batches of every rank: ``result[rank][step]``."""
    options: dict[str, Any] = {"batch_size": 16, "epochs": 1, "prefetch": 0} | changed
    return [
        list(Loader(SOURCE, world=World(rank=rank, size=world_size), **options))
        for rank in range(world_size)
    ]


def rows_of(batch: CTRBatch):
    """A batch as one tuple a row, every feature included."""
    pooled, unpooled = batch.pooled.to_dict(), batch.unpooled.to_dict()
    columns = [jagged.to_dense() for jagged in (*pooled.values(), *unpooled.values())]
    flat = zip(
        batch.dense.tolist(), batch.labels.tolist(), batch.grouping_keys.tolist(), strict=True
    )
    return [
        ([column[row].tolist() for column in columns], *values) for row, values in enumerate(flat)
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_join_to_the_single_process_batch(world_size, shuffle):
    single = batches(1, shuffle=shuffle, seed=5)[0]
    ranks = batches(world_size, shuffle=shuffle, seed=5)
    assert {len(rank) for rank in ranks} == {len(single)}
    for step, whole in enumerate(single):
        shares = [rank[step] for rank in ranks]
        assert [row for share in shares for row in rows_of(share)] == rows_of(whole)
        assert {share.position for share in shares} == {whole.position}
        assert {share.loss_denominator for share in shares} == {whole.loss_denominator / world_size}
        assert whole.loss_denominator == len(row_ids(whole))


@pytest.mark.parametrize("batch_size", [1, 7, 16, 73, 200])
def test_every_row_once_an_epoch(batch_size):
    (epoch,) = batches(1, batch_size=batch_size, epochs=2)
    steps = Loader(SOURCE, batch_size=batch_size).steps_per_epoch
    assert len(epoch) == 2 * steps
    first, second = (
        [row for batch in half for row in row_ids(batch)] for half in (epoch[:steps], epoch[steps:])
    )
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second


def test_order_is_reproducible_and_the_seeds():
    def rows(**options):
        return [row for batch in batches(1, **options)[0] for row in row_ids(batch)]

    assert rows(seed=1) == rows(seed=1)
    assert rows(seed=1) != rows(seed=2)
    shard = [row for batch in batches(1, shuffle=False)[0] for row in row_ids(batch)[:2]]
    assert shard[:9] == list(range(9))  # the first shard of 16 / 8 rows a step, in stored order


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 1), (8, 1)])
def test_resumes_at_every_step_on_another_number_of_ranks(before, after):
    whole = batches(before)
    for stop in range(1, len(whole[0]) + 1):
        seen = [row for rank in whole for batch in rank[:stop] for row in row_ids(batch)]
        position = whole[0][stop - 1].position
        rest = batches(after, start=position)
        seen += [row for rank in rest for batch in rank for row in row_ids(batch)]
        assert sorted(seen) == list(range(ROWS)), f"stopped after step {stop}"
        single = batches(1, start=position)[0]
        assert [rows_of(batch) for batch in single] == [
            [row for rank in rest for row in rows_of(rank[step])] for step in range(len(single))
        ]


def test_resumes_with_another_batch_size():
    (first, *_) = batches(1, batch_size=16)[0]
    rest = batches(1, batch_size=24, start=first.position)[0]
    rows = [row for batch in (first, *rest) for row in row_ids(batch)]
    assert sorted(rows) == list(range(ROWS))


def test_the_last_position_is_the_next_epochs_first():
    (epoch,) = batches(1)
    assert epoch[-1].position == LoaderState(epoch=1, lane_rows=0, num_canonical_shards=8)
    (second,) = batches(1, start=epoch[-1].position, epochs=2)
    (both,) = batches(1, epochs=2)
    assert [rows_of(batch) for batch in both[len(epoch) :]] == [rows_of(b) for b in second]


def test_ranks_whose_lanes_have_ended_get_batches_without_rows():
    source = toy_source(9)  # 8 shards: 7 of one row, one of two
    ranks = [
        list(Loader(source, batch_size=8, world=World(rank=rank, size=8), epochs=1, prefetch=0))
        for rank in range(8)
    ]
    assert {len(rank) for rank in ranks} == {2}
    last = [rank[1] for rank in ranks]
    assert sum(len(row_ids(batch)) for batch in last) == 1
    assert {batch.loss_denominator for batch in last} == {1 / 8}
    assert len({batch.position for batch in last}) == 1


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetching_changes_nothing(depth):
    ahead = [rows_of(batch) for batch in batches(1, prefetch=depth, epochs=2)[0]]
    assert ahead == [rows_of(batch) for batch in batches(1, epochs=2)[0]]


def test_breaking_out_of_an_endless_loader_leaves_no_thread():
    before = threading.active_count()
    for step, _ in enumerate(Loader(SOURCE, batch_size=16)):
        if step == 12:
            break
    assert threading.active_count() == before


def test_iterating_again_starts_again():
    loader = Loader(SOURCE, batch_size=16, epochs=1)
    assert [rows_of(batch) for batch in loader] == [rows_of(batch) for batch in loader]


class CountingSource(BlockSource):
    """One block, and a note of every time it is read."""

    def __init__(self, table):
        self.table = table
        self.reads = []

    @property
    def schema(self):
        return SCHEMA

    @property
    def block_rows(self):
        return (self.table.num_rows,)

    def describe(self, block):
        return f"block {block}"

    def read(self, epoch, block):
        self.reads.append((epoch, block))
        return self.table


def test_lanes_in_one_block_share_its_decoding():
    source = CountingSource(toy_table(64))
    assert len(list(Loader(source, batch_size=16, epochs=2, prefetch=0))) == 8
    assert source.reads == [(0, 0), (1, 0)]


BAD = replace_column(toy_table(40), "label", [2 if row % 10 == 0 else 1 for row in range(40)])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_bad_rows_are_skipped_and_reported_once(caplog, prefetch):
    loader = Loader(TableSource((BAD,)), batch_size=8, epochs=1, prefetch=prefetch)
    epoch = list(loader)
    assert sorted(row for batch in epoch for row in row_ids(batch)) == [
        row for row in range(40) if row % 10
    ]
    assert sum(len(batch.weights) for batch in epoch) == 36
    assert sum(batch.loss_denominator for batch in epoch) == 40
    told = [record.message for record in caplog.records]
    assert sum(int(text.split(": ")[1].split()[0]) for text in told if "in this epoch" in text) == 4
    assert "block 0, row 20: label is 2, not 0 or 1; the row is skipped" in told


def test_too_many_bad_rows_are_fatal():
    loader = Loader(TableSource((BAD,)), batch_size=8, epochs=1, max_bad_rows=3)
    with pytest.raises(DataError, match=r"4 bad rows.*max_bad_rows 3.*block 0.*label is 2"):
        list(loader)


def test_the_limit_is_for_an_epoch():
    loader = Loader(TableSource((BAD,)), batch_size=8, epochs=3, max_bad_rows=4)
    assert len(list(loader)) == 15


def test_refuses_what_it_cannot_do():
    for name in ("prefetch", "workers", "bucket_by_length"):
        negative: dict[str, Any] = {name: -1}
        with pytest.raises(ValueError, match=rf"data\.{name} must be at least 0, got -1"):
            Loader(SOURCE, batch_size=16, **negative)
    with pytest.raises(DataError, match="no rows"):
        Loader(toy_source(0), batch_size=16)
    beyond = replace(batches(1)[0][0].position, lane_rows=11)
    with pytest.raises(
        ValueError, match=r"read 11 rows of each canonical shard, but one has only 10"
    ):
        Loader(SOURCE, batch_size=16, start=beyond)
    with pytest.raises(ValueError, match="8 canonical shards, which 3 ranks cannot share"):
        Loader(SOURCE, batch_size=24, start=beyond, world=World(rank=0, size=3))
