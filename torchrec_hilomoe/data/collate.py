"""Rows of decoded blocks become a ``CTRBatch``: the only place that builds a KeyedJaggedTensor.

Shape legend:
    B  rows of the batch
    N  rows of a block
    K  keys
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.decode import DecodedBlock, IdColumns
from torchrec_hilomoe.data.schema import Schema

__all__ = ["Rows", "collate"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows ``[start, stop)`` of a block, in the order it was decoded in."""

    block: DecodedBlock
    start: int
    stop: int


def collate(
    schema: Schema, parts: Sequence[Rows], *, mean_rows: float, position: Position
) -> CTRBatch:
    """Join rows into a batch, in the order given.

    A schema without pooled features gets a ``pooled`` with no keys and stride ``B``.

    Args:
        schema: What the blocks were decoded with.
        parts: At least one row in all.
        mean_rows: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.
        position: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.

    Returns:
        The batch, on the CPU, in memory of its own.
    """
    unpooled = [part.block.unpooled for part in parts]
    lengths_KB = _lengths(parts, unpooled)
    history_lengths = lengths_KB[len(schema.candidate) :]
    pooled = [part.block.pooled for part in parts]
    return CTRBatch(
        pooled=_jagged(schema.pooled_keys, parts, pooled, _lengths(parts, pooled)),
        unpooled=_jagged(schema.unpooled_keys, parts, unpooled, lengths_KB),
        dense=_joined([part.block.dense[part.start : part.stop] for part in parts]),
        labels=_joined([part.block.labels[part.start : part.stop] for part in parts]),
        weights=_joined([part.block.weights[part.start : part.stop] for part in parts]),
        groups=_joined([part.block.groups[part.start : part.stop] for part in parts]),
        longest=int(history_lengths.max(initial=1)),
        mean_rows=mean_rows,
        position=position,
        time=(
            _joined([part.block.time[part.start : part.stop] for part in parts])
            if schema.time is not None
            else None
        ),
        times=tuple(_event_times(parts, group) for group in range(len(schema.event_times))),
    )


def _lengths(parts: Sequence[Rows], columns: Sequence[IdColumns]) -> np.ndarray:
    pieces = [
        ids.lengths[:, part.start : part.stop] for part, ids in zip(parts, columns, strict=True)
    ]
    return np.concatenate(pieces, axis=1)


def _jagged(
    keys: Sequence[str],
    parts: Sequence[Rows],
    columns: Sequence[IdColumns],
    lengths_KB: np.ndarray,
) -> KeyedJaggedTensor:
    pieces = [
        ids.values[key][ids.offsets[key][part.start] : ids.offsets[key][part.stop]]
        for key in range(len(keys))
        for part, ids in zip(parts, columns, strict=True)
    ]
    values = np.concatenate(pieces, dtype=np.int64) if pieces else np.empty(0, dtype=np.int64)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(values),
        lengths=torch.from_numpy(lengths_KB.reshape(-1)),
        stride=lengths_KB.shape[1],
        # Known here for nothing; asking the tensor later would wait for the device.
        length_per_key=lengths_KB.sum(axis=1).tolist(),
    )


def _event_times(parts: Sequence[Rows], group: int) -> torch.Tensor:
    columns = [part.block.times[group] for part in parts]
    pieces = [
        column.values[column.offsets[part.start] : column.offsets[part.stop]]
        for part, column in zip(parts, columns, strict=True)
    ]
    return torch.from_numpy(np.concatenate(pieces, dtype=np.int64))


def _joined(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces))
