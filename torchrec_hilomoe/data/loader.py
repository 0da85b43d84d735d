"""``Loader``: the blocks of a source become this rank's batches, at an exact position.

The order of rows and their sharing over ranks is arithmetic (:mod:`.lanes`); decoding happens
once a block (:mod:`.decode`), joining once a batch (:mod:`.collate`), both ahead of training in
a thread (:mod:`.prefetch`).
"""

import logging
from collections.abc import Callable, Generator, Iterator
from weakref import WeakValueDictionary

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.collate import collate, Rows
from torchrec_hilomoe.data.decode import decode_block, DecodedBlock, padding_block
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.lanes import choose_lanes, Epoch, Segment, World
from torchrec_hilomoe.data.prefetch import prefetch
from torchrec_hilomoe.data.source import BlockSource

__all__ = ["Loader", "World", "choose_lanes"]

logger = logging.getLogger(__name__)

REPORTED_BAD_ROWS = 3  # of each block; the rest are counted


class Loader:
    """Iterates over this rank's share of the global batches, from a position on.

    Every rank yields the same number of batches. The rows of a global batch are the same for
    every world size with the same lanes, and joining the ranks' batches gives the batch of a
    single process, except that a rank without a row in an epoch's last batch gets one padding
    row of weight 0. Each new iteration starts from ``start`` again.

    Args:
        source: The rows.
        batch_size: Rows of a **global** batch.
        world: This process among the ranks.
        seed: Fixes the order of rows, with the epoch.
        shuffle: Whether to read blocks, and rows within blocks, in a random order.
        start: Where to begin; the position of the last batch that was trained on. ``None`` is
            the beginning of epoch 0.
        epochs: The epoch to stop before, counted from 0 whatever ``start``; ``None`` never stops.
        prefetch: Batches made ahead in a thread; 0 has no thread.
        max_bad_rows: Bad rows that this rank accepts in one epoch. They are reported, and keep
            their place with weight 0.

    Raises:
        ValueError: If no lanes suit ``batch_size`` and the world, or ``start`` cannot be resumed.
        DataError: If the source has no row; while iterating, if a block is unreadable or too
            many rows are bad.
    """

    def __init__(
        self,
        source: BlockSource,
        *,
        batch_size: int,
        world: World | None = None,
        seed: int = 0,
        shuffle: bool = True,
        start: Position | None = None,
        epochs: int | None = None,
        prefetch: int = 4,
        max_bad_rows: int = 100,
    ) -> None:
        if min(seed, prefetch, max_bad_rows) < 0:
            raise ValueError(
                "seed, data.prefetch and data.max_bad_rows must not be negative, got "
                f"{seed}, {prefetch} and {max_bad_rows}."
            )
        if not sum(source.block_rows):
            raise DataError("the source has no rows, so there is nothing to read.")
        self.world = world or World()
        self.lanes = choose_lanes(batch_size, self.world.size, start.lanes if start else None)
        self.start = start or Position(epoch=0, lane_rows=0, lanes=self.lanes)
        self._source = source
        self._rows_per_lane = batch_size // self.lanes
        self._seed = seed if shuffle else None
        self._epochs = epochs
        self._prefetch = prefetch
        self._max_bad_rows = max_bad_rows
        if self.start.lane_rows > self._epoch(0).longest_lane:
            raise ValueError(
                f"the position to resume has read {self.start.lane_rows} rows of each lane, but a "
                f"lane has only {self._epoch(0).longest_lane}; the data set is not the one that "
                "the position was saved with."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return -(-self._epoch(0).longest_lane // self._rows_per_lane)

    def __iter__(self) -> Generator[CTRBatch, None, None]:
        return prefetch(self._batches(), self._prefetch)

    def _epoch(self, number: int) -> Epoch:
        return Epoch(self._source.block_rows, self.lanes, epoch=number, seed=self._seed)

    def _batches(self) -> Iterator[CTRBatch]:
        at, lane_rows = self.start.epoch, self.start.lane_rows
        while self._epochs is None or at < self._epochs:
            yield from self._epoch_batches(at, lane_rows)
            at, lane_rows = at + 1, 0

    def _epoch_batches(self, number: int, lane_rows: int) -> Iterator[CTRBatch]:
        epoch = self._epoch(number)
        blocks = _Blocks(self._source, number, epoch, self._max_bad_rows)
        share = self.lanes // self.world.size
        first = self.world.rank * share
        lanes = [
            _Lane(epoch.segments(lane, lane_rows), blocks.open)
            for lane in range(first, first + share)
        ]
        while lane_rows < epoch.longest_lane:
            rows = epoch.batch_rows(lane_rows, self._rows_per_lane)
            parts = [part for lane in lanes for part in lane.take(self._rows_per_lane)]
            lane_rows += self._rows_per_lane
            over = lane_rows >= epoch.longest_lane
            yield collate(
                self._source.schema,
                parts or [Rows(block=padding_block(self._source.schema), start=0, stop=1)],
                mean_rows=rows / self.world.size,
                position=Position(
                    epoch=number + 1 if over else number,
                    lane_rows=0 if over else lane_rows,
                    lanes=self.lanes,
                ),
            )


class _Blocks:
    """Decodes blocks, and counts the bad rows of the segments that are read of them."""

    def __init__(self, source: BlockSource, number: int, epoch: Epoch, max_bad_rows: int) -> None:
        self._source = source
        self._number = number
        self._epoch = epoch
        self._max_bad_rows = max_bad_rows
        self._bad_rows = 0
        # Lanes that stand in the same block share one decoding; nothing else keeps a block.
        self._open: WeakValueDictionary[int, DecodedBlock] = WeakValueDictionary()

    def open(self, segment: Segment) -> Rows:
        """Return the rows of ``segment``, and report the bad ones among them."""
        block = self._open.get(segment.block)
        if block is None:
            table = self._source.read(self._number, segment.block)
            order_N = self._epoch.row_order(segment.block, table.num_rows)
            block = self._open[segment.block] = decode_block(table, self._source.schema, order_N)
        bad = [text for at, text in block.bad.items() if segment.start <= at < segment.stop]
        if bad:
            self._report(self._source.describe(segment.block), bad)
        return Rows(block=block, start=segment.start, stop=segment.stop)

    def _report(self, where: str, bad: list[str]) -> None:
        for text in bad[:REPORTED_BAD_ROWS]:
            logger.warning("%s, %s; the row is skipped", where, text)
        self._bad_rows += len(bad)
        logger.warning(
            "%s: %d bad rows skipped, %d in this epoch so far", where, len(bad), self._bad_rows
        )
        if self._bad_rows > self._max_bad_rows:
            raise DataError(
                f"{self._bad_rows} bad rows in one epoch, more than data.max_bad_rows "
                f"{self._max_bad_rows}; the last are in {where}, for example {bad[0]}. "
                "Repair and prepare the data again, or raise the limit."
            )


class _Lane:
    """The rows of one lane, from its segments."""

    def __init__(self, segments: Iterator[Segment], open_rows: Callable[[Segment], Rows]) -> None:
        self._rows = map(open_rows, segments)
        self._at: Rows | None = next(self._rows, None)

    def take(self, count: int) -> list[Rows]:
        """Return the next ``count`` rows, or what is left of them."""
        taken = []
        while count and self._at is not None:
            head = min(count, self._at.stop - self._at.start)
            stop = self._at.start + head
            taken.append(Rows(block=self._at.block, start=self._at.start, stop=stop))
            count -= head
            if stop < self._at.stop:
                self._at = Rows(block=self._at.block, start=stop, stop=self._at.stop)
            else:
                self._at = next(self._rows, None)
        return taken
