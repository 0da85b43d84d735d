"""Between jagged rows and padded tensors: the only place where sequences are padded.

Shape legend:
    B  rows
    T  events of all rows together
    N  tokens of all rows together, targets included: T + B
    L  the longest row of the batch
    W  width
"""

from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  # registers the operators in torch.ops.fbgemm
import torch
from torch import Tensor

from torchrec_hilomoe.embeddings.features import History

__all__ = [
    "Layout",
    "Tokens",
    "layout_of",
    "max_rows",
    "mean_of",
    "mean_rows",
    "offsets_of",
    "pad",
    "softmax_rows",
    "sum_rows",
    "tokens_of",
    "unpad",
    "valid",
]


@dataclass(frozen=True)
class Layout:
    """Whose each event of a jagged list is.

    Attributes:
        offsets: ``(B + 1,)`` int64, where each row's events begin.
        row: ``(T,)`` int64, the row of each event.
    """

    offsets: Tensor
    row: Tensor


def layout_of(history: History) -> Layout:
    """Lay out the events of ``history``, or anything else that is one for each of them."""
    lengths_B = history.lengths
    rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    total = history.events.shape[0]
    return Layout(
        offsets=offsets_of(lengths_B),
        row=torch.repeat_interleave(rows_B, lengths_B, output_size=total),
    )


def offsets_of(lengths_B: Tensor) -> Tensor:
    """Return ``(B + 1,)``, where rows of these lengths begin, and where the last one ends."""
    ends_B = torch.cumsum(lengths_B, dim=0)
    return torch.cat([ends_B.new_zeros(1), ends_B])


def sum_rows(values_TW: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(B, W)``, the sum over each row's events; zero for a row without any."""
    return torch.segment_reduce(values_TW, "sum", offsets=offsets, axis=0)


def mean_rows(history: History) -> Tensor:
    """Return ``(B, W)``, the mean of each row's events; zero for a row without any."""
    means_BW = mean_of(history.events, history.lengths)
    return means_BW.expand(history.target.shape[0], -1) if history.shared else means_BW


def mean_of(values_TW: Tensor, lengths_B: Tensor) -> Tensor:
    """Return ``(B, W)``, the mean of each row's values; zero for a row without any."""
    sums_BW = sum_rows(values_TW, offsets_of(lengths_B))
    return sums_BW / lengths_B.clamp(min=1).unsqueeze(1)


def max_rows(values_TW: Tensor, offsets: Tensor, row_T: Tensor) -> Tensor:
    """Return ``(B, W)``, the largest of each row's events; equal ones share its gradient.

    Whoever calls it from a ``forward`` wraps it for FX.

    Args:
        values_TW: Row after row; each row has an event.
        offsets: ``(B + 1,)``, where each row's events begin.
        row_T: The row of each event.
    """
    return _MaxRows.apply(values_TW, offsets, row_T)


class _MaxRows(torch.autograd.Function):
    """PyTorch's own gradient gives all of a negative one to each of several equal elements."""

    @staticmethod
    def forward(ctx, values_TW, offsets, row_T):
        largest_BW = torch.segment_reduce(values_TW, "max", offsets=offsets, axis=0)
        ctx.save_for_backward(values_TW, largest_BW, offsets, row_T)
        return largest_BW

    @staticmethod
    def backward(ctx, grad_BW):
        values_TW, largest_BW, offsets, row_T = ctx.saved_tensors
        largest_TW = (values_TW == largest_BW.index_select(0, row_T)).to(grad_BW.dtype)
        share_BW = grad_BW / sum_rows(largest_TW, offsets)
        return share_BW.index_select(0, row_T).mul_(largest_TW), None, None


def softmax_rows(scores_T: Tensor, layout: Layout) -> Tensor:
    """Return ``(T,)``, each event's share among those of its row."""
    largest_B = torch.segment_reduce(scores_T.detach(), "max", offsets=layout.offsets)
    exp_T = torch.exp(scores_T - largest_B[layout.row])
    return exp_T / sum_rows(exp_T, layout.offsets)[layout.row]


@dataclass(frozen=True)
class Tokens:
    """Each row's target and events, jagged: the target first, then the events.

    Attributes:
        values: ``(N, W)``.
        offsets: ``(B + 1,)`` int64, where each row begins; its target stands there.
        recency: ``(N,)`` int64, distance to the target: 0 the target, 1 the latest event.
        max_seqlen: Most tokens in a row.
    """

    values: Tensor
    offsets: Tensor
    recency: Tensor
    max_seqlen: int


def tokens_of(history: History, max_seqlen: int) -> Tokens:
    """Put each row's target before its events.

    Args:
        history: One behaviour sequence.
        max_seqlen: Most events in a row of the batch.
    """
    events_TW, lengths_B = history.events, history.lengths
    rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    ends_B = torch.cumsum(lengths_B, dim=0)
    row_T = torch.repeat_interleave(rows_B, lengths_B, output_size=events_TW.shape[0])
    event_T = torch.arange(events_TW.shape[0], device=lengths_B.device)
    offsets = torch.cat([ends_B.new_zeros(1), ends_B + rows_B + 1])
    targets_B = offsets[:-1]
    # Targets and events together fill every place once; sorting the places assembles the rows.
    place_N = torch.cat([targets_B, event_T + row_T + 1])
    recency_N = torch.cat([torch.zeros_like(targets_B), ends_B[row_T] - event_T])
    values_NW = torch.cat([history.target, events_TW])
    order_N = torch.argsort(place_N)
    return Tokens(
        values=values_NW[order_N],
        offsets=offsets,
        recency=recency_N[order_N],
        max_seqlen=max_seqlen + 1,
    )


def pad(values_NW: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
    """Return ``(B, L, W)``, zero beyond each row's end."""
    return torch.ops.fbgemm.jagged_to_padded_dense(values_NW, [offsets], [max_seqlen], 0.0)


def unpad(padded_BLW: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Return the ``(N, W)`` values of the rows, without padding."""
    return torch.ops.fbgemm.dense_to_jagged(padded_BLW, [offsets], total)[0]


def valid(offsets: Tensor, max_seqlen: int) -> Tensor:
    """Return ``(B, L)`` booleans: true where a row has a token."""
    lengths_B = offsets[1:] - offsets[:-1]
    return torch.arange(max_seqlen, device=offsets.device) < lengths_B.unsqueeze(1)
