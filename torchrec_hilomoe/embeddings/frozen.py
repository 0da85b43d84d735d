"""Frozen tables get the vectors that came with the data, each rank its own part of them.

Shape legend:
    N  rows of a table
    W  width of its vectors
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.embeddings.tables import POOLED_COPY
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["load_frozen_tables", "open_vectors"]

ROWS_AT_ONCE = 1 << 16  # so that a part of a table is never in memory twice
AGAIN = "Prepare the data again."


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
            vectors_NW = open_vectors(sparse, table, folder)
            for part, (row, column) in _parts(held):
                _copy(vectors_NW[row:, column:], part)


def open_vectors(sparse: SparseArch, table: str, folder: str) -> np.ndarray:
    """Map the vectors of a frozen table into memory: ``(N, W)`` float32, read when used.

    Raises:
        DataError: If the file is missing or has another shape than the schema says.
    """
    given = sparse.schema.frozen[table]
    path = f"{folder.rstrip('/')}/{given.file}"
    try:
        # A remote file is fetched once, into the path manager's cache.
        vectors_NW = np.load(path_manager.get_local_path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the vectors of frozen table {table!r} cannot be read from {path} ({error}). {AGAIN}"
        ) from error
    wanted = (sparse.schema.tables[table], given.width)
    if vectors_NW.shape != wanted or vectors_NW.dtype != np.float32:
        raise DataError(
            f"{path} holds {vectors_NW.dtype} of shape {vectors_NW.shape}, the schema wants "
            f"float32 of shape {wanted} for frozen table {table!r}. {AGAIN}"
        )
    return vectors_NW


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
