"""A rank's batch, cut into micro-batches whose losses add up to the batch's own.

Shape legend:
    B  rows     P  rows of a piece
    T  events of one sequence group, all rows together
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch

__all__ = ["cut", "cut_all"]


def cut_all(
    batches: Iterator[CTRBatch], pieces: int, event_keys: Sequence[str]
) -> Iterator[CTRBatch]:
    """Cut every batch; arguments as in :func:`cut`."""
    for batch in batches:
        yield from cut(batch, pieces, event_keys)


def cut(batch: CTRBatch, pieces: int, event_keys: Sequence[str]) -> Iterator[CTRBatch]:
    """Yield contiguous pieces of a batch's rows.

    Each keeps the batch's ``mean_rows``, by which its loss is divided, so that the pieces' losses
    and gradients add up to the batch's. An auxiliary loss is the mean over the pieces' own, each
    over its rows of all ranks: for z the batch's, where pieces are equally large, and for balance
    a stricter one, because each piece is to be balanced. A piece without a row of its own gets the
    first row with weight 0: every rank runs as many micro-batches.

    Args:
        batch: On the host.
        pieces: How many.
        event_keys: For each of ``batch.times``, a key of ``batch.unpooled`` whose ids are
            parallel to it.
    """
    rows = len(batch.labels)
    for piece in range(pieces):
        start, stop = piece * rows // pieces, (piece + 1) * rows // pieces
        if start < stop:
            yield _rows(batch, start, stop, event_keys)
        else:
            empty = _rows(batch, 0, 1, event_keys)
            yield replace(empty, weights=torch.zeros_like(empty.weights))


def _rows(batch: CTRBatch, start: int, stop: int, event_keys: Sequence[str]) -> CTRBatch:
    return replace(
        batch,
        pooled=_jagged(batch.pooled, start, stop),
        unpooled=_jagged(batch.unpooled, start, stop),
        dense=batch.dense[start:stop],
        labels=batch.labels[start:stop],
        weights=batch.weights[start:stop],
        groups=batch.groups[start:stop],
        time=None if batch.time is None else batch.time[start:stop],
        times=tuple(
            _events(times_T, batch.unpooled[key].lengths(), start, stop)
            for times_T, key in zip(batch.times, event_keys, strict=True)
        ),
    )


def _jagged(ids: KeyedJaggedTensor, start: int, stop: int) -> KeyedJaggedTensor:
    """Rows of every key: ids are stored key after key."""
    keys, rows = ids.keys(), ids.stride()
    if not keys:
        return KeyedJaggedTensor(
            keys=[], values=ids.values(), lengths=ids.lengths(), stride=stop - start
        )
    ends = ids.offsets().tolist()
    values = ids.values()
    parts = [values[ends[at + start] : ends[at + stop]] for at in range(0, len(keys) * rows, rows)]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(parts),
        # Of one row, flattening would be a view with gaps, which collectives refuse.
        lengths=ids.lengths().view(len(keys), rows)[:, start:stop].flatten().contiguous(),
        stride=stop - start,
    )


def _events(values_T: Tensor, lengths_B: Tensor, start: int, stop: int) -> Tensor:
    first = int(lengths_B[:start].sum())
    return values_T[first : first + int(lengths_B[start:stop].sum())]
