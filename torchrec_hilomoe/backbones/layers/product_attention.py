"""Attention by a product of each event and its row's target, learned or plain.

Shape legend:
    B  rows
    T  events of all rows together
    W  width of an event, and of the target
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.jagged import Layout, softmax_rows, sum_rows

__all__ = ["ProductAttention"]

# Opaque to FX: it is a function of its own making.
torch.fx.wrap("dot")


class ProductAttention(nn.Module):
    """The softmax, over a row's events ``h``, of ``(K h) . t`` with the target ``t``.

    Args:
        width: ``W``.
        learned: Whether there is a ``K``, which starts as the identity; without, it stays one.

    Attributes:
        hidden: ``K``.
    """

    def __init__(self, width: int, *, learned: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width, bias=False) if learned else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the plain product."""
        if isinstance(self.hidden, nn.Linear):
            nn.init.eye_(self.hidden.weight)

    def weights(self, target_BW: Tensor, events_TW: Tensor, layout: Layout) -> Tensor:
        """Return ``(T,)``, the weight of each event."""
        scores_T = dot(target_BW, self.hidden(events_TW), layout.row, layout.offsets)
        return softmax_rows(scores_T, layout)


def dot(target_BW: Tensor, events_TW: Tensor, row_T: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(T,)``, the product of each event and its row's target.

    Args:
        target_BW: One target a row.
        events_TW: Row after row.
        row_T: The row of each event.
        offsets: ``(B + 1,)``, where each row's events begin.
    """
    return _Dot.apply(target_BW, events_TW, row_T, offsets)


class _Dot(torch.autograd.Function):
    """The target's gradient is a sum over a row's events, which stand together."""

    @staticmethod
    def forward(ctx, target_BW, events_TW, row_T, offsets):
        ctx.save_for_backward(target_BW, events_TW, row_T, offsets)
        return torch.linalg.vecdot(target_BW.index_select(0, row_T), events_TW)

    @staticmethod
    def backward(ctx, grad_T):
        target_BW, events_TW, row_T, offsets = ctx.saved_tensors
        to_event_TW = target_BW.index_select(0, row_T) * grad_T.unsqueeze(1)
        return sum_rows(events_TW * grad_T.unsqueeze(1), offsets), to_event_TW, None, None
