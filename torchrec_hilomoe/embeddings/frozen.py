"""Frozen tables get the vectors that came with the data, each rank its own part of them.

Shape legend:
    N  rows of a table
    W  width of its vectors
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_hilomoe.data.frozen_vectors import open_vectors
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.embeddings.tables import POOLED_COPY

__all__ = ["load_frozen_tables"]

ROWS_AT_ONCE = 1 << 16  # so that a part of a table is never in memory twice


def load_frozen_tables(sparse: SparseArch, folder: str) -> None:
    """Fill the frozen tables from a prepared folder, before training or sharded already.

    Args:
        sparse: Its tables must have memory, which they have once they are sharded.
        folder: Where the schema is.

    Raises:
        DataError: If a file is missing or has another shape than the schema says.
    """
    for collection in sparse.given.values():
        for key, held in collection.state_dict().items():
            table = key.split(".")[-2].removesuffix(POOLED_COPY)
            vectors_NW = open_vectors(sparse.schema, table, folder)
            for part, (row, column) in _parts(held):
                _copy(vectors_NW[row:, column:], part)


def _parts(held: Tensor | ShardedTensor) -> list[tuple[Tensor, tuple[int, int]]]:
    """Return what this rank holds of a table, and where in it each part begins."""
    if isinstance(held, ShardedTensor):
        return [
            (shard.tensor, (shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]))
            for shard in held.local_shards()
        ]
    return [(held, (0, 0))]


@torch.no_grad()
def _copy(vectors: np.ndarray, part: Tensor) -> None:
    rows, width = part.shape
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        # The file's memory is read-only, which PyTorch warns of; the copy is not.
        part[start:stop] = torch.from_numpy(np.array(vectors[start:stop, :width]))
