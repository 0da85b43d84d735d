"""Workers change nothing but the time, and sorting by length nothing but the order."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.datasets import replace_column, row_ids, TableSource, toy_source, toy_table
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.runtime.world import World

SOURCE = toy_source(13, 1, 0, 30, 22, 7)
ROWS = sum(SOURCE.block_rows)
WAYS = [(0, 0), (0, 3), (1, 0), (1, 2), (3, 0), (3, 4)]  # workers, prefetch


def loader(world_size=1, rank=0, source=SOURCE, **changed):
    options: dict[str, Any] = {"batch_size": 16, "epochs": 1, "prefetch": 0} | changed
    return Loader(source, world=World(rank=rank, size=world_size), **options)


def tensors_of(batch: CTRBatch):
    jagged = [
        tensor for kjt in (batch.pooled, batch.unpooled) for tensor in (kjt.values(), kjt.lengths())
    ]
    return [*jagged, batch.dense, batch.labels, batch.weights, batch.grouping_keys]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert (one.position, one.max_seqlen, one.loss_denominator) == (
            (other.position, other.max_seqlen, other.loss_denominator)
        )
        for left, right in zip(tensors_of(one), tensors_of(other), strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@pytest.mark.parametrize(("workers", "prefetch"), WAYS[1:])
@pytest.mark.parametrize("bucket", [0, 2])
def test_batches_are_the_same_to_the_bit(workers, prefetch, bucket):
    options: dict[str, Any] = {"epochs": 3, "bucket_by_length": bucket}
    ahead = loader(workers=workers, prefetch=prefetch, **options)
    assert_same(list(ahead), list(loader(**options)))


@pytest.mark.parametrize("bucket", [0, 2, 3])
@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (2, 3)), ((4, 2), (2, 0)), ((2, 1), (8, 1))]
)
def test_resumes_at_every_step_on_other_ranks_and_workers(before, after, bucket):
    def epoch(way, **options):
        ranks, workers = way
        return [
            list(loader(ranks, rank, workers=workers, bucket_by_length=bucket, **options))
            for rank in range(ranks)
        ]

    whole = epoch(before)
    for stop in range(1, len(whole[0]) + 1):
        seen = [row for rank in whole for batch in rank[:stop] for row in row_ids(batch)]
        rest = epoch(after, start=whole[0][stop - 1].position)
        seen += [row for rank in rest for batch in rank for row in row_ids(batch)]
        assert sorted(seen) == list(range(ROWS)), f"stopped after step {stop}"


@pytest.mark.parametrize(("workers", "prefetch"), WAYS)
def test_an_error_comes_after_the_batches_before_it(workers, prefetch):
    bad = replace_column(toy_table(40), "label", [2] * 39 + [1])
    source = TableSource((*SOURCE.blocks, bad))
    options = {"source": source, "shuffle": False, "max_bad_rows": 20}
    seen = []
    with pytest.raises(DataError, match=r"bad rows in one epoch.*block 6.*label is 2"):
        seen.extend(loader(workers=workers, prefetch=prefetch, **options))
    assert seen == [] or seen[0].position.lane_rows == 2
    inline = []
    with pytest.raises(DataError, match="block 6"):
        inline.extend(loader(**options))
    assert_same(seen, inline)


@pytest.mark.parametrize(("workers", "prefetch"), WAYS)
def test_stopping_early_leaves_no_thread(workers, prefetch):
    before = threading.active_count()
    for step, _ in enumerate(loader(workers=workers, prefetch=prefetch, epochs=None)):
        if step == 12:
            break
    assert threading.active_count() == before


class NotingSource(TableSource):
    """Notes which blocks were read."""

    def read(self, epoch, block):
        reads.append(block)
        return super().read(epoch, block)


reads: list[int] = []


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_once_where_border_blocks_are_read_twice(workers):
    reads.clear()
    source = NotingSource(tuple(toy_table(5, first=5 * n, seed=n) for n in range(131)))
    rows = [row for batch in loader(source=source, workers=workers) for row in row_ids(batch)]
    assert sorted(rows) == list(range(5 * 131))
    assert set(reads) == set(range(131))
    assert 131 < len(reads) <= 131 + 7


def test_reads_ahead_a_bounded_number_of_blocks():
    reads.clear()
    source = NotingSource(tuple(toy_table(16, first=16 * n) for n in range(64)))
    batches = iter(loader(source=source, workers=2, batch_size=8, shuffle=False))
    next(batches)
    assert len(reads) <= 8 + 8 + 1  # a block a shard, as many ahead, and the one being asked for
    batches.close()


def padding(**options):
    """Padded events of the histories over real ones."""
    real = padded = 0
    for batch in loader(source=toy_source(200, 200, 200), batch_size=16, **options):
        lengths = torch.stack([batch.unpooled[f"{n}_item"].lengths() for n in ("clicks", "views")])
        real += int(lengths.max(0).values.sum())
        padded += batch.max_seqlen * len(batch.labels)
    return padded / real - 1


def test_sorting_by_length_pads_less():
    assert padding(bucket_by_length=8) < 0.75 * padding()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sorted_batches_are_the_same_on_any_number_of_ranks(world_size):
    single = list(loader(bucket_by_length=3, epochs=2))
    ranks = [
        list(loader(world_size, rank, bucket_by_length=3, epochs=2)) for rank in range(world_size)
    ]
    for step, whole in enumerate(single):
        shares = [rank[step] for rank in ranks]
        assert [row for share in shares for row in row_ids(share)] == row_ids(whole)
        assert {share.position for share in shares} == {whole.position}


def test_a_window_is_resumed_as_it_was_sorted_or_not_at_all():
    first, second, *_ = loader(bucket_by_length=2)
    with pytest.raises(ValueError, match=r"inside a window of 4 rows.*make 0, so rows"):
        loader(start=first.position)
    with pytest.raises(ValueError, match=r"inside a window of 4 rows.*make 6, so rows"):
        loader(start=first.position, bucket_by_length=3)
    with pytest.raises(ValueError, match=r"inside a window of 4 rows.*make 6, so rows"):
        loader(start=second.position, bucket_by_length=3)
    rest = loader(start=second.position)  # a whole window was read
    rows = [row for batch in (first, second, *rest) for row in row_ids(batch)]
    assert sorted(rows) == list(range(ROWS))
    other_batch = loader(start=first.position, bucket_by_length=4, batch_size=8)  # the same window
    rows = [row for batch in (first, *other_batch) for row in row_ids(batch)]
    assert sorted(rows) == list(range(ROWS))


@pytest.mark.parametrize("batch_size", [8, 16, 24, 32, 48, 64, 96])
def test_every_position_of_a_window_loses_no_row_or_is_refused(batch_size):
    """Batches may be larger where the window is as long; they must fill what is left of it."""
    whole = list(loader(bucket_by_length=12))
    before: list[CTRBatch] = []
    refused: list[str] = []
    for batch in whole:
        before.append(batch)
        changed = {"batch_size": batch_size, "bucket_by_length": 192 // batch_size}
        try:
            rest = loader(start=batch.position, **changed)
        except ValueError as error:
            refused.append(str(error))
            continue
        if batch.position.epoch == 0:
            rows = [row for part in (*before, *rest) for row in row_ids(part)]
            assert sorted(rows) == list(range(ROWS))
    assert all("train.batch_size" in message for message in refused)
    assert bool(refused) == (batch_size > 16)
    assert len(refused) < len(whole)


def test_a_batch_size_that_does_not_fill_a_window_is_named():
    first, *_ = loader(bucket_by_length=4)
    with pytest.raises(
        ValueError,
        match=r"2 rows into a window of 8 rows.*train\.batch_size now takes 4 rows at a time",
    ):
        loader(start=first.position, bucket_by_length=2, batch_size=32)


def test_sorting_keeps_times_with_their_events():
    schema = replace(
        SOURCE.schema, sequences=(replace(SOURCE.schema.sequences[0], time="clicks_time"),)
    )
    table = toy_table(60)
    table = table.append_column("clicks_time", table["clicks_item"])
    source = TableSource((table,), schema)
    for batch in loader(source=source, bucket_by_length=2):
        assert torch.equal(batch.times[0], batch.unpooled["clicks_item"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to pin memory for")
def test_pinning_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"data\.pin_memory is true, but PyTorch sees no GPU"):
        loader(pin_memory=True)


@pytest.mark.gpu
def test_pinned_batches_are_pinned():
    for batch in loader(pin_memory=True, workers=2, prefetch=2):
        assert all(tensor.is_pinned() for tensor in tensors_of(batch))
