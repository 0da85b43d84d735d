"""A rank's batch, split into micro-batches whose losses add up to the batch's own.

Shape legend:
    B  rows     P  rows of a micro-batch
    G  sequence groups
    T  events of one of them, all rows together
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import SequenceGroup

__all__ = ["split_microbatches"]


def split_microbatches(
    batch: CTRBatch, count: int, sequences: Sequence[SequenceGroup]
) -> Iterator[CTRBatch]:
    """Yield contiguous micro-batches of a batch's rows.

    Each keeps the batch's ``loss_denominator``, by which its loss is divided, so that the losses
    and gradients of the micro-batches add up to the batch's. An auxiliary loss is the mean over the
    micro-batches' own, each over its rows of all ranks: for z the batch's, where they are equally
    large, and for balance a stricter one, because each is to be balanced. A micro-batch may be
    without a row: every rank runs as many micro-batches.

    Args:
        batch: On the host.
        count: Number of micro-batches.
        sequences: Those of the batch's schema.
    """
    rows = len(batch.labels)
    for index in range(count):
        yield _rows(batch, index * rows // count, (index + 1) * rows // count, sequences)


def _rows(batch: CTRBatch, start: int, stop: int, sequences: Sequence[SequenceGroup]) -> CTRBatch:
    lengths_GB = [batch.unpooled[group.fields[0].name].lengths() for group in sequences]
    timed = [
        lengths_B for group, lengths_B in zip(sequences, lengths_GB, strict=True) if group.time
    ]
    none_P = batch.labels.new_zeros(stop - start, dtype=torch.int32)
    longest_P = torch.stack([none_P, *(of_B[start:stop] for of_B in lengths_GB)]).amax(dim=0)
    return replace(
        batch,
        pooled=_jagged(batch.pooled, start, stop),
        unpooled=_jagged(batch.unpooled, start, stop),
        dense=batch.dense[start:stop],
        labels=batch.labels[start:stop],
        weights=batch.weights[start:stop],
        grouping_keys=batch.grouping_keys[start:stop],
        num_tokens=int(longest_P.sum()),
        time=None if batch.time is None else batch.time[start:stop],
        times=tuple(
            _events(times_T, lengths_B, start, stop)
            for times_T, lengths_B in zip(batch.times, timed, strict=True)
        ),
        teacher_logits=None if batch.teacher_logits is None else batch.teacher_logits[start:stop],
    )


def _jagged(ids: KeyedJaggedTensor, start: int, stop: int) -> KeyedJaggedTensor:
    """Rows of every key: ids are stored key after key."""
    keys, rows, stride = ids.keys(), ids.stride(), max(1, stop - start)
    if start == stop or not keys:
        lengths = ids.lengths().new_zeros(len(keys) * stride)
        return KeyedJaggedTensor(keys=keys, values=ids.values()[:0], lengths=lengths, stride=stride)
    ends = ids.offsets().tolist()
    values = ids.values()
    parts = [values[ends[at + start] : ends[at + stop]] for at in range(0, len(keys) * rows, rows)]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(parts),
        # Of one row, flattening would be a view with gaps, which collectives refuse.
        lengths=ids.lengths().view(len(keys), rows)[:, start:stop].flatten().contiguous(),
        stride=stride,
    )


def _events(values_T: Tensor, lengths_B: Tensor, start: int, stop: int) -> Tensor:
    first = int(lengths_B[:start].sum())
    return values_T[first : first + int(lengths_B[start:stop].sum())]
