"""The blocks of a rank's shards, in the order of need, each read once; and their bad rows.

A border between two shards that falls inside a block gives it to both. Where one rank has both and
blocks are few, it stays decoded from its first use to its last: at most one block for each border.
"""

import logging
from collections.abc import Iterator, Sequence

from torchrec_hilomoe.data.canonical_shards import Epoch, Segment
from torchrec_hilomoe.data.decode import DecodedBlock
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.source import BlockSource

__all__ = ["OpenBlocks", "needed_blocks"]

logger = logging.getLogger(__name__)

REPORTED_BAD_ROWS = 3  # of each block; the rest are counted


def needed_blocks(
    epoch: Epoch, shards: Sequence[int], skip: int, rows_per_shard: int
) -> Iterator[int]:
    """Yield the blocks of an epoch in the order of need, each once unless blocks are many.

    Args:
        epoch: The order of rows.
        shards: A rank's.
        skip: Rows of each shard that are consumed already.
        rows_per_shard: Rows that are taken of each shard in turn.
    """
    shared = set(epoch.shared_blocks(shards, skip))
    read = set()
    for segment in epoch.openings(shards, skip, rows_per_shard):
        if segment.block not in read:
            yield segment.block
        if segment.block in shared:
            read.add(segment.block)


class OpenBlocks:
    """Hands out the decoded blocks of one epoch, and reports the bad rows that are read.

    Args:
        source: Says where a block is.
        decoded: What :func:`needed_blocks` names, decoded, in that order.
        shared: How many segments will be opened of each block that has more than one.
        max_bad_rows: Bad rows of the epoch that are accepted.
    """

    def __init__(
        self,
        source: BlockSource,
        decoded: Iterator[DecodedBlock],
        shared: dict[int, int],
        max_bad_rows: int,
    ) -> None:
        self._source = source
        self._decoded = decoded
        self._uses_left = shared
        self._max_bad_rows = max_bad_rows
        self._kept: dict[int, DecodedBlock] = {}
        self._bad_rows = 0

    def open(self, segment: Segment) -> DecodedBlock:
        """Return the block of ``segment``, after reporting the bad rows of the segment.

        Raises:
            DataError: If the block is unreadable, or too many rows are bad.
        """
        block = self._kept.pop(segment.block, None) or next(self._decoded)
        if segment.block in self._uses_left:
            self._uses_left[segment.block] -= 1
            if self._uses_left[segment.block]:
                self._kept[segment.block] = block
        bad = [text for at, text in block.bad.items() if segment.start <= at < segment.stop]
        if bad:
            self._report(self._source.describe(segment.block), bad)
        return block

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
