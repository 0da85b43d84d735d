"""Which rows a rank reads, and when: arithmetic on row counts alone.

An epoch's rows stand in one order, fixed by the seed and the epoch. That order is cut into
``shards`` contiguous shards; a global batch takes the next rows of every shard, and a rank owns
neighbouring shards. So the rows of a global batch do not depend on the number of ranks, and a
block is decoded by one rank, or by two where the border of their shards falls inside it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from operator import itemgetter

import numpy as np

__all__ = ["Epoch", "Segment", "choose_num_canonical_shards"]

PREFERRED_SHARDS = 8
MANY_BLOCKS = 16  # a shard
# Streams of random numbers: for the order of blocks, of rows inside each, of sorted windows.
BLOCK_ORDER, ROW_ORDER, WINDOW_ORDER = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows ``[start, stop)``, in the order of the epoch, of one block."""

    block: int
    start: int
    stop: int


def choose_num_canonical_shards(batch_size: int, world_size: int, wanted: int | None = None) -> int:
    """Choose the number of shards: the same for 1, 2, 4 and 8 ranks wherever it can be.

    Args:
        batch_size: Rows of a global batch.
        world_size: Number of ranks, which must divide the shards.
        wanted: The shards of a position to resume, which must be kept.

    Returns:
        The largest divisor of ``batch_size`` that ``world_size`` divides, at most 8 (or
        ``world_size``, where that is more).

    Raises:
        ValueError: If there is none, or ``wanted`` is not one.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(
            f"train.batch_size and the world size must be at least 1, got {batch_size} and "
            f"{world_size}."
        )
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        nearest = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ValueError(
            f"train.batch_size is global, so the world size must divide it: got batch_size "
            f"{batch_size} and {world_size} ranks. Take {nearest}."
        )
    if wanted is None:
        most = max(PREFERRED_SHARDS, world_size)
        return max(n for n in range(world_size, most + 1, world_size) if batch_size % n == 0)
    if wanted < 1:
        raise ValueError(f"the position's canonical shards must be at least 1, got {wanted}.")
    if wanted % world_size:
        sizes = [size for size in range(1, wanted + 1) if wanted % size == 0]
        raise ValueError(
            f"the position to resume has {wanted} canonical shards, which {world_size} ranks "
            f"cannot share evenly; resume on {_any_of(sizes)} ranks."
        )
    if batch_size % wanted:
        lower = batch_size // wanted * wanted
        sizes = [size for size in (lower, lower + wanted) if size]
        raise ValueError(
            f"the position to resume has {wanted} canonical shards, which do not divide "
            f"train.batch_size {batch_size}; take {_any_of(sizes)}."
        )
    return wanted


def _any_of(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


class Epoch:
    """The order of one epoch's rows, and its cut into shards.

    Args:
        block_rows: Rows of each block, as the source tells.
        shards: Number of shards.
        epoch: Which epoch, from 0.
        seed: Fixes the order together with ``epoch``; ``None`` keeps the order of the files.

    Attributes:
        rows: Rows of the epoch, over all shards.
    """

    def __init__(
        self, block_rows: Sequence[int], shards: int, *, epoch: int, seed: int | None
    ) -> None:
        self._seed = seed
        self._epoch = epoch
        self._shards = shards
        self._blocks = np.arange(len(block_rows))
        if seed is not None:
            self._blocks = self._generator(BLOCK_ORDER, 0).permutation(len(block_rows))
        # Where each block, in this epoch's order, begins among the epoch's rows.
        self._begins = np.concatenate([[0], np.cumsum(np.asarray(block_rows)[self._blocks])])
        self.rows = int(self._begins[-1])
        self._shard_lengths = tuple(map(self.shard_length, range(shards)))

    def _generator(self, stream: int, block: int) -> np.random.Generator:
        return np.random.default_rng([self._seed or 0, self._epoch, stream, block])

    @property
    def number(self) -> int:
        """Which epoch, from 0."""
        return self._epoch

    @property
    def longest_shard(self) -> int:
        """Rows of the longest shard; the others have this many or one less."""
        return -(-self.rows // self._shards)

    def shard_length(self, shard: int) -> int:
        """Rows of ``shard``."""
        return self._border(shard + 1) - self._border(shard)

    def batch_rows(self, lane_rows: int, rows_per_shard: int) -> int:
        """Rows of the global batch that starts when ``lane_rows`` of each shard are consumed."""
        lefts = (length - lane_rows for length in self._shard_lengths)
        return sum(min(max(left, 0), rows_per_shard) for left in lefts)

    def segments(self, shard: int, skip: int) -> Iterator[Segment]:
        """Yield the segments of ``shard`` in order, without its first ``skip`` rows."""
        at, end = self._border(shard) + skip, self._border(shard + 1)
        while at < end:
            index = self._index_of(at)
            begin, stop = int(self._begins[index]), min(end, int(self._begins[index + 1]))
            yield Segment(block=int(self._blocks[index]), start=at - begin, stop=stop - begin)
            at = stop

    def openings(self, shards: Sequence[int], skip: int, rows_per_shard: int) -> Iterator[Segment]:
        """Yield the segments of several shards in the order in which batches come to them.

        Args:
            shards: A rank's.
            skip: Rows of each shard that are consumed already.
            rows_per_shard: Rows that a batch takes of each shard.
        """

        def numbered(shard: int) -> Iterator[tuple[tuple[int, int], Segment]]:
            lane_rows = 0
            for segment in self.segments(shard, skip):
                yield (lane_rows // rows_per_shard, shard), segment
                lane_rows += segment.stop - segment.start

        # merge() keeps the order within a shard where one batch comes to several segments of it.
        for _, segment in merge(*map(numbered, shards), key=itemgetter(0)):
            yield segment

    def shared_blocks(self, shards: Sequence[int], skip: int) -> dict[int, int]:
        """Count the segments of blocks that hold a border between two of ``shards``.

        Where blocks are many, reading those few twice costs less than the memory to keep them:
        then there are none.
        """
        uses: Counter[int] = Counter()
        if len(self._blocks) > MANY_BLOCKS * self._shards:
            return {}
        for shard in shards:
            at, end = self._border(shard) + skip, self._border(shard + 1)
            if at < end:
                uses.update({int(self._blocks[self._index_of(row)]) for row in (at, end - 1)})
        return {block: count for block, count in uses.items() if count > 1}

    def row_order(self, block: int, rows: int) -> np.ndarray | None:
        """Return the stored row at each place of a block; ``None`` is the order of the file."""
        if self._seed is None:
            return None
        return self._generator(ROW_ORDER, block).permutation(rows)

    def descending(self, window: int) -> bool:
        """Say whether the longest rows come first in a window that is sorted by length.

        Every step of a window then sees long and short rows equally often.
        """
        return self._seed is not None and self._generator(WINDOW_ORDER, window).random() < 0.5

    def _index_of(self, row: int) -> int:
        # "right" steps over empty blocks, which begin where their successor does.
        return int(np.searchsorted(self._begins, row, side="right")) - 1

    def _border(self, shard: int) -> int:
        return shard * self.rows // self._shards
