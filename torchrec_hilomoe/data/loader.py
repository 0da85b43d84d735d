"""``Loader``: the blocks of a source become this rank's batches, at an exact position.

The order of rows and their sharing over ranks is arithmetic (:mod:`.canonical_shards`); decoding
happens once a block (:mod:`.decode`, :mod:`.blocks`), joining once a batch (:mod:`.collate`), both
ahead of training in threads (:mod:`.prefetch`).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count

import torch

from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.blocks import needed_blocks, OpenBlocks
from torchrec_hilomoe.data.bucketing import SortedShard
from torchrec_hilomoe.data.canonical_shards import choose_num_canonical_shards, Epoch, Segment
from torchrec_hilomoe.data.collate import collate
from torchrec_hilomoe.data.decode import decode_block, DecodedBlock, no_rows, Rows
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.layout import ColumnLayout
from torchrec_hilomoe.data.prefetch import map_ahead, prefetch
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.runtime.world import World

__all__ = ["Loader", "choose_num_canonical_shards"]


class Loader:
    """Iterates over this rank's share of the global batches, from a position on.

    Every rank yields the same number of batches. The rows of a global batch are the same for
    every world size with the same shards, and joining the ranks' batches gives the batch of a
    single process; a rank may be without a row in an epoch's last batch. Each new iteration starts
    from ``start`` again.

    Args:
        source: The rows.
        batch_size: Rows of a **global** batch.
        world: This process among the ranks.
        seed: Fixes the order of rows, with the epoch.
        shuffle: Whether to read blocks, and rows within blocks, in a random order.
        start: Where to begin; the position of the last batch that was trained on. ``None`` is
            the beginning of epoch 0.
        epochs: The epoch to stop before, counted from 0 whatever ``start``; ``None`` never stops.
        workers: Threads that read and decode blocks ahead; 0 leaves it to who makes batches.
        prefetch: Batches made ahead in a thread; 0 makes each when it is asked for.
        max_bad_rows: Bad rows that this rank accepts in one epoch. They are reported, and missing
            from their batches.
        bucket_by_length: Batches in a window within which rows are sorted by their longest history,
            so that batches need less padding; 0 and 1 sort nothing.
        pin_memory: Whether batches come in page-locked memory, from which a GPU copies while it
            computes.

    Raises:
        ValueError: If no shards suit ``batch_size`` and the world, or ``start`` cannot be resumed.
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
        start: LoaderState | None = None,
        epochs: int | None = None,
        workers: int = 0,
        prefetch: int = 4,
        max_bad_rows: int = 100,
        bucket_by_length: int = 0,
        pin_memory: bool = False,
    ) -> None:
        counts = {
            "seed": seed,
            "data.workers": workers,
            "data.prefetch": prefetch,
            "data.max_bad_rows": max_bad_rows,
            "data.bucket_by_length": bucket_by_length,
        }
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if pin_memory and not torch.cuda.is_available():
            raise ValueError(
                "data.pin_memory is true, but PyTorch sees no GPU here, and only copies to a GPU "
                "need page-locked memory; set it to false, or to null, which decides by the device."
            )
        if not sum(source.block_rows):
            raise DataError("the source has no rows, so there is nothing to read.")
        self.world = world or World()
        self.num_canonical_shards = choose_num_canonical_shards(
            batch_size, self.world.size, start.num_canonical_shards if start else None
        )
        self._source = source
        self._layout = ColumnLayout(source.schema)
        share = self.num_canonical_shards // self.world.size
        self._shards = range(self.world.rank * share, (self.world.rank + 1) * share)
        self._rows_per_shard = batch_size // self.num_canonical_shards
        self._window_rows = bucket_by_length * self._rows_per_shard if bucket_by_length > 1 else 0
        self.start = start or LoaderState(
            epoch=0,
            lane_rows=0,
            num_canonical_shards=self.num_canonical_shards,
            window_rows=self._window_rows,
        )
        self._seed = seed if shuffle else None
        self._epochs_end = epochs
        self._workers = workers
        self._prefetch = prefetch
        self._max_bad_rows = max_bad_rows
        self._pin_memory = pin_memory
        self._check_start()

    def _check_start(self) -> None:
        if self.start.lane_rows > self._epoch(0).longest_shard:
            raise ValueError(
                f"the position to resume has read {self.start.lane_rows} rows of each canonical "
                f"shard, but one has only {self._epoch(0).longest_shard}; the data set is not the "
                "one that the position was saved with."
            )
        saved, window = self.start.window_rows, self._window_rows
        if saved != window and any(self.start.lane_rows % rows for rows in (saved, window) if rows):
            raise ValueError(
                f"the position to resume is inside a window of {saved} rows of each canonical "
                "shard (0 is no sorting by length), but data.bucket_by_length and "
                "train.batch_size now make "
                f"{window}, so rows would be read twice or never; resume with the values that it "
                "was saved with, at least until the next epoch."
            )
        inside = self.start.lane_rows % window if window else 0
        if (window - inside) % self._rows_per_shard:
            raise ValueError(
                f"the position to resume is {inside} rows into a window of {window} rows of each "
                f"canonical shard, and train.batch_size now takes {self._rows_per_shard} rows at "
                "a time, which do not fill the rest of it, so rows would never be read; resume "
                "with the train.batch_size and data.bucket_by_length that it was saved with, at "
                "least until the next epoch."
            )

    @property
    def rows(self) -> int:
        """Rows of the split, over all ranks; bad ones among them."""
        return sum(self._source.block_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return -(-self._epoch(0).longest_shard // self._rows_per_shard)

    def __iter__(self) -> Generator[CTRBatch, None, None]:
        return prefetch(self._batches(), self._prefetch)

    def _epoch(self, number: int) -> Epoch:
        return Epoch(
            self._source.block_rows, self.num_canonical_shards, epoch=number, seed=self._seed
        )

    def _epochs(self) -> Iterator[tuple[Epoch, int]]:
        """Yield the epochs to read, each with the rows of a shard that are consumed already."""
        for number in count(self.start.epoch):
            if self._epochs_end is not None and number >= self._epochs_end:
                return
            yield self._epoch(number), self.start.lane_rows if number == self.start.epoch else 0

    def _needed(self) -> Iterator[tuple[Epoch, int]]:
        """Yield the blocks to decode, over all epochs."""
        for epoch, skip in self._epochs():
            at_once = self._window_rows or self._rows_per_shard
            for block in needed_blocks(epoch, self._shards, self._window_start(skip), at_once):
                yield epoch, block

    def _decode(self, needed: tuple[Epoch, int]) -> DecodedBlock:
        epoch, block = needed
        table = self._source.read(epoch.number, block)
        return decode_block(table, self._layout, epoch.row_order(block, table.num_rows))

    def _batches(self) -> Generator[CTRBatch, None, None]:
        # Shards may come to a next block all at once.
        ahead = max(len(self._shards), self._workers)
        with closing(
            map_ahead(self._decode, self._needed(), workers=self._workers, ahead=ahead)
        ) as decoded:
            for epoch, skip in self._epochs():
                yield from self._epoch_batches(epoch, skip, decoded)

    def _epoch_batches(
        self, epoch: Epoch, lane_rows: int, decoded: Iterator[DecodedBlock]
    ) -> Iterator[CTRBatch]:
        shards = self._open_shards(epoch, lane_rows, decoded)
        while lane_rows < epoch.longest_shard:
            rows = epoch.batch_rows(lane_rows, self._rows_per_shard)
            parts = [part for shard in shards for part in shard.take()]
            lane_rows += self._rows_per_shard
            over = lane_rows >= epoch.longest_shard
            batch = collate(
                self._layout,
                parts or [no_rows(self._layout)],
                loss_denominator=rows / self.world.size,
                position=LoaderState(
                    epoch=epoch.number + 1 if over else epoch.number,
                    lane_rows=0 if over else lane_rows,
                    num_canonical_shards=self.num_canonical_shards,
                    window_rows=self._window_rows,
                ),
            )
            yield batch.pin_memory() if self._pin_memory else batch

    def _open_shards(
        self, epoch: Epoch, lane_rows: int, decoded: Iterator[DecodedBlock]
    ) -> "list[_Shard] | list[SortedShard]":
        begin = self._window_start(lane_rows)
        shared = epoch.shared_blocks(self._shards, begin)
        blocks = OpenBlocks(self._source, decoded, shared, self._max_bad_rows)
        at_once = self._window_rows or self._rows_per_shard
        shards = [
            _Shard(epoch.segments(shard, begin), blocks.open, at_once) for shard in self._shards
        ]
        if not self._window_rows:
            return shards
        first = begin // self._window_rows
        return [
            SortedShard(
                self._layout,
                shard.take,
                lambda window: epoch.descending(first + window),
                rows=self._rows_per_shard,
                skip=lane_rows - begin,
            )
            for shard in shards
        ]

    def _window_start(self, lane_rows: int) -> int:
        return lane_rows - lane_rows % self._window_rows if self._window_rows else lane_rows


class _Shard:
    """The rows of one shard, a batch's share at a time.

    Args:
        segments: Where the rows are.
        open_block: Called for each segment when its first row is needed.
        rows: How many are taken at a time.
    """

    def __init__(
        self,
        segments: Iterator[Segment],
        open_block: Callable[[Segment], DecodedBlock],
        rows: int,
    ) -> None:
        self._segments = segments
        self._open_block = open_block
        self._rows = rows
        self._pieces: deque[Rows] = deque()

    def take(self) -> list[Rows]:
        """Return the next rows, or what is left of them."""
        taken: list[Rows] = []
        missing = self._rows
        while missing:
            if not self._pieces:
                segment = next(self._segments, None)
                if segment is None:
                    break
                # The whole segment is sliced at once, where the batches to come will want it.
                inner = range(segment.start + missing, segment.stop, self._rows)
                borders = [segment.start, *inner, segment.stop]
                self._pieces.extend(self._open_block(segment).pieces(borders))
            taken.append(self._pieces.popleft())
            missing -= taken[-1].lengths.shape[1]
        return taken
