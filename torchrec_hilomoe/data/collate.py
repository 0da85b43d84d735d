"""Rows of decoded blocks become a ``CTRBatch``: the only place that builds a KeyedJaggedTensor.

Rows of weight 0 end here. What counts nowhere must not be seen by what looks at a whole batch, such
as batch norm or a router's balance, and those could not tell which rows it is.

Shape legend:
    B  rows of the batch
    K  keys of both jagged tensors, the unpooled ones first
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.decode import lengths_of_ids, Rows
from torchrec_hilomoe.data.schema import Schema

__all__ = ["collate"]


def collate(
    schema: Schema, parts: Sequence[Rows], *, mean_rows: float, position: Position
) -> CTRBatch:
    """Join the rows that count into a batch, in the order given.

    A schema without pooled features gets a ``pooled`` with no keys.

    Args:
        schema: What the rows were decoded with.
        parts: One at least, which may be without rows.
        mean_rows: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.
        position: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.

    Returns:
        The batch, on the CPU, in memory of its own.
    """
    floats_2B = _joined([part.floats for part in parts], axis=1)
    if not floats_2B[1].all():
        parts = [_counted(schema, part) for part in parts]
        floats_2B = _joined([part.floats for part in parts], axis=1)
    lengths_KB = np.concatenate([part.lengths for part in parts], axis=1)
    # All ids of the batch, key by key, are copied at once into one buffer.
    columns = list(zip(*(part.ids for part in parts), strict=True))
    ids = torch.from_numpy(
        np.concatenate([piece for column in columns for piece in column], dtype=np.int64)
    )
    sizes = [sum(map(len, column)) for column in columns]
    unpooled, keys = len(schema.unpooled_keys), len(lengths_KB)
    border, end = sum(sizes[:unpooled]), sum(sizes[:keys])
    integers_2B = _joined([part.integers for part in parts], axis=1)
    longest_B = lengths_KB[len(schema.candidate) : unpooled].max(axis=0, initial=0)
    return CTRBatch(
        pooled=_jagged(
            schema.pooled_keys, ids[border:end], lengths_KB[unpooled:], sizes[unpooled:keys]
        ),
        unpooled=_jagged(
            schema.unpooled_keys, ids[:border], lengths_KB[:unpooled], sizes[:unpooled]
        ),
        dense=_joined([part.dense for part in parts], axis=0),
        labels=floats_2B[0],
        weights=floats_2B[1],
        groups=integers_2B[0],
        longest=int(longest_B.max(initial=1)),
        mean_rows=mean_rows,
        position=position,
        steps=int(longest_B.sum()),
        time=integers_2B[1] if schema.time is not None else None,
        times=ids[end:].split(sizes[keys:]) if sizes[keys:] else (),
    )


def _counted(schema: Schema, rows: Rows) -> Rows:
    """Leave out rows of weight 0."""
    counts_N = rows.floats[1] > 0
    if counts_N.all():
        return rows
    return Rows(
        ids=[
            array[np.repeat(counts_N, rows.lengths[key])]
            for array, key in zip(rows.ids, lengths_of_ids(schema), strict=True)
        ],
        lengths=rows.lengths[:, counts_N],
        dense=rows.dense[counts_N],
        floats=rows.floats[:, counts_N],
        integers=rows.integers[:, counts_N],
    )


def _jagged(
    keys: Sequence[str], values: Tensor, lengths_KB: np.ndarray, per_key: list[int]
) -> KeyedJaggedTensor:
    if lengths_KB.shape[1] == 0:  # TorchRec has no batches without a row: see CTRBatch
        lengths_KB = np.zeros((len(lengths_KB), 1), dtype=np.int32)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=values,
        lengths=torch.from_numpy(lengths_KB.reshape(-1)),
        stride=lengths_KB.shape[1],
        # Known here for nothing; asking the tensor later would wait for the device.
        length_per_key=per_key,
    )


def _joined(pieces: Sequence[np.ndarray], axis: int) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces, axis=axis))
