"""Rows become a ``CTRBatch``: the only place that builds a ``KeyedJaggedTensor``.

Rows of weight 0 end here. What counts nowhere must not be seen by what looks at a whole batch, such
as batch norm or a router's balance, and those could not tell which rows it is.

Shape legend:
    B  rows of the batch
    S  keys of one id a row
    G  kinds of lengths: one a row, then those of each of ``ColumnLayout.lists``
    K  keys of both jagged tensors, the unpooled ones first
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.decode import Rows
from torchrec_hilomoe.data.layout import ColumnLayout

__all__ = ["collate"]


def collate(
    layout: ColumnLayout, parts: Sequence[Rows], *, loss_denominator: float, position: LoaderState
) -> CTRBatch:
    """Join the rows that count into a batch, in the order given.

    A schema without pooled features gets a ``pooled`` with no keys, and one without histories such
    an ``unpooled``.

    Args:
        layout: What the rows were decoded with.
        parts: One at least, which may be without rows.
        loss_denominator: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.
        position: See :class:`~torchrec_hilomoe.data.batch.CTRBatch`.

    Returns:
        The batch, on the CPU, in memory of its own.
    """
    floats_2B = np.concatenate([part.floats for part in parts], axis=1)
    if not floats_2B[1].all():
        parts = [_counted(layout, part) for part in parts]
        floats_2B = np.concatenate([part.floats for part in parts], axis=1)
    lengths_GB = np.concatenate([part.lengths for part in parts], axis=1)
    longest_B = lengths_GB[1 : 1 + len(layout.schema.sequences)].max(axis=0, initial=0)
    pieces = _pieces(layout, parts)
    # All ids of the batch are copied at once into one buffer.
    ids = torch.from_numpy(np.concatenate([*chain.from_iterable(pieces)], dtype=np.int64))
    sizes = [sum(map(len, of_place)) for of_place in pieces]
    lengths_KB = lengths_GB.take(layout.place_lengths, axis=0)
    integers_2B = np.concatenate([part.integers for part in parts], axis=1)
    unpooled = len(layout.unpooled_keys)
    keys = unpooled + len(layout.pooled_keys)
    border, end = sum(sizes[:unpooled]), sum(sizes[:keys])
    return CTRBatch(
        pooled=_jagged(
            layout.pooled_keys, ids[border:end], lengths_KB[unpooled:keys], sizes[unpooled:keys]
        ),
        unpooled=_jagged(
            layout.unpooled_keys, ids[:border], lengths_KB[:unpooled], sizes[:unpooled]
        ),
        dense=torch.from_numpy(np.concatenate([part.dense for part in parts])),
        labels=torch.from_numpy(floats_2B[0]),
        weights=torch.from_numpy(floats_2B[1]),
        grouping_keys=torch.from_numpy(integers_2B[0]),
        max_seqlen=int(longest_B.max(initial=1)),
        loss_denominator=loss_denominator,
        position=position,
        num_tokens=int(longest_B.sum()),
        time=torch.from_numpy(integers_2B[1]) if layout.schema.time is not None else None,
        times=ids[end:].split(sizes[keys:]) if sizes[keys:] else (),
    )


def _pieces(layout: ColumnLayout, parts: Sequence[Rows]) -> list[Sequence[np.ndarray]]:
    """Return the ids of each place, part by part."""
    singles_SB = np.concatenate([part.singles for part in parts], axis=1)
    columns = [(of_key,) for of_key in singles_SB]
    columns += zip(*(part.lists for part in parts), strict=True)
    return [columns[place] for place in layout.places]


def _counted(layout: ColumnLayout, rows: Rows) -> Rows:
    """Leave out rows of weight 0."""
    counts_N = rows.floats[1] > 0
    if counts_N.all():
        return rows
    return Rows(
        singles=rows.singles[:, counts_N],
        lists=[
            array[np.repeat(counts_N, rows.lengths[n])]
            for array, n in zip(rows.lists, layout.list_lengths, strict=True)
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
