"""The arithmetic of shards: who reads what, and that nothing is read twice or never."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe.data.canonical_shards import choose_num_canonical_shards, Epoch
from torchrec_hilomoe.runtime.world import World

BLOCKS = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "shards"),
    [(1024, 1, 8), (1024, 2, 8), (1024, 8, 8), (1024, 16, 16), (12, 1, 6), (12, 3, 6), (7, 1, 7)],
)
def test_chooses_the_most_lanes_that_fit(batch_size, world_size, shards):
    assert choose_num_canonical_shards(batch_size, world_size) == shards


@given(st.integers(1, 300), st.integers(1, 20))
def test_chosen_lanes_are_the_largest_allowed(batch_size, world_size):
    allowed = [
        n for n in range(1, max(8, world_size) + 1) if n % world_size == 0 and batch_size % n == 0
    ]
    if allowed:
        assert choose_num_canonical_shards(batch_size, world_size) == max(allowed)
    else:
        with pytest.raises(ValueError, match=f"batch_size {batch_size} and {world_size} ranks"):
            choose_num_canonical_shards(batch_size, world_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 3), r"batch_size 1000 and 3 ranks\. Take 999 or 1002"),
        ((2, 4), r"batch_size 2 and 4 ranks\. Take 4\."),
        ((0, 1), r"must be at least 1, got 0 and 1"),
        (
            (96, 4, 6),
            r"6 canonical shards, which 4 .* evenly; resume on 1, 2, 3 or 6 ranks",
        ),
        (
            (30, 2, 8),
            r"8 canonical shards, which do not divide train\.batch_size 30; take 24 or 32",
        ),
        ((6, 2, 8), r"batch_size 6; take 8\."),
        ((8, 1, 0), r"shards must be at least 1, got 0"),
    ],
)
def test_refuses_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_num_canonical_shards(*arguments)


@pytest.mark.parametrize(("rank", "size"), [(-1, 1), (2, 2), (0, 0)])
def test_world_refuses_a_rank_outside(rank, size):
    with pytest.raises(ValueError, match=f"got rank {rank} and size {size}"):
        World(rank=rank, size=size)


@given(BLOCKS, st.integers(1, 9), st.none() | st.integers(0, 3), st.data())
def test_segments_cover_every_row_once(block_rows, shards, seed, data):
    epoch = Epoch(block_rows, shards, epoch=2, seed=seed)
    seen = []
    for shard in range(shards):
        rows = [
            (segment.block, row)
            for segment in epoch.segments(shard, 0)
            for row in range(segment.start, segment.stop)
        ]
        assert len(rows) == epoch.shard_length(shard)
        assert epoch.longest_shard - len(rows) in (0, 1)
        skip = data.draw(st.integers(0, len(rows)))
        rest = [
            (segment.block, row)
            for segment in epoch.segments(shard, skip)
            for row in range(segment.start, segment.stop)
        ]
        assert rest == rows[skip:]
        seen += rows
    assert sorted(seen) == [(b, row) for b, rows in enumerate(block_rows) for row in range(rows)]


@given(BLOCKS, st.integers(1, 9), st.integers(1, 5))
def test_batch_rows_add_up(block_rows, shards, rows_per_shard):
    epoch = Epoch(block_rows, shards, epoch=0, seed=0)
    starts = range(0, epoch.longest_shard, rows_per_shard)
    assert sum(epoch.batch_rows(start, rows_per_shard) for start in starts) == sum(block_rows)


def test_orders_differ_by_epoch_seed_and_block():
    def orders(epoch, seed):
        order = Epoch([50] * 20, 4, epoch=epoch, seed=seed)
        blocks = [segment.block for shard in range(4) for segment in order.segments(shard, 0)]
        rows, other_rows = order.row_order(3, 50), order.row_order(4, 50)
        assert rows is not None
        assert other_rows is not None
        return blocks, rows, other_rows

    blocks, rows, other_rows = orders(epoch=0, seed=0)
    again_blocks, again_rows, _ = orders(epoch=0, seed=0)
    assert blocks == again_blocks
    np.testing.assert_array_equal(rows, again_rows)
    assert not np.array_equal(rows, other_rows)
    for epoch, seed in ((1, 0), (0, 1)):
        later_blocks, later_rows, _ = orders(epoch, seed)
        assert blocks != later_blocks
        assert not np.array_equal(rows, later_rows)


def test_no_seed_keeps_the_stored_order():
    epoch = Epoch([5, 0, 3], 2, epoch=4, seed=None)
    assert [segment.block for shard in (0, 1) for segment in epoch.segments(shard, 0)] == [0, 0, 2]
    assert epoch.row_order(0, 5) is None


@given(BLOCKS, st.integers(1, 9), st.integers(1, 9), st.data())
def test_openings_are_in_the_order_in_which_batches_need_them(block_rows, shards, rows, data):
    epoch = Epoch(block_rows, shards, epoch=1, seed=data.draw(st.none() | st.integers(0, 3)))
    mine = range(data.draw(st.integers(0, shards - 1)), shards)
    skip = data.draw(st.integers(0, epoch.longest_shard))
    lefts = {shard: list(epoch.segments(shard, skip)) for shard in mine}
    needed = []
    borders = dict.fromkeys(mine, 0)  # where the next segment of a shard begins
    for start in range(0, epoch.longest_shard, rows):
        for shard in mine:
            while lefts[shard] and borders[shard] < start + rows:
                needed.append(lefts[shard].pop(0))
                borders[shard] += needed[-1].stop - needed[-1].start
    assert list(epoch.openings(mine, skip, rows)) == needed
    uses = Counter(segment.block for segment in needed)
    shared = epoch.shared_blocks(mine, skip)
    assert shared == {block: count for block, count in uses.items() if count > 1}


def test_borders_are_not_kept_where_blocks_are_many():
    few, many = (Epoch([3] * count, 2, epoch=0, seed=None) for count in (31, 33))
    assert few.shared_blocks(range(2), 0) == {15: 2}
    assert many.shared_blocks(range(2), 0) == {}
