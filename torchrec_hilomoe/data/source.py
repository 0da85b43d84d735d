"""Where rows come from: numbered blocks of Arrow columns that any rank can read on its own."""

from abc import ABC, abstractmethod

import pyarrow as pa

from torchrec_hilomoe.data.schema import Schema

__all__ = ["BlockSource"]


class BlockSource(ABC):
    """Random access to the blocks of one split: Parquet row groups, or generated rows.

    Blocks may be read in any order, on any rank, any number of times, with the same result.
    """

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """What the columns mean."""

    @property
    @abstractmethod
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each block, known without reading it."""

    @abstractmethod
    def describe(self, block: int) -> str:
        """Say where a block is, for messages: the file and the row group."""

    @abstractmethod
    def read(self, epoch: int, block: int) -> pa.Table:
        """Return ``schema.columns`` of a block.

        Args:
            epoch: Generated data is fresh in every epoch; files ignore it.
            block: Index into :attr:`block_rows`.

        Raises:
            DataError: If the block cannot be read; names file and block.
        """
