"""How much each event matters to the target: by DIN's MLP, or by a product of the two.

It works on the events there are. Padding is never made, so it costs nothing and is in no
activation's statistics.

Shape legend:
    B  rows
    T  events of all rows together
    W  width of an event, and of the target
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.jagged import Layout, softmax_rows, sum_rows
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP

__all__ = ["ProductAttention", "TargetAttention", "compare"]

# Opaque to FX: it asks for shapes.
torch.fx.wrap("compare")


class TargetAttention(nn.Module):
    """Events weighted by an MLP over ``[t, h, t - h, t * h]``, with target ``t`` and event ``h``.

    Args:
        width: ``W``.
        units: Hidden widths of the MLP.
        activation: Of its hidden layers.
        dropout: Share of its hidden units dropped in training.
        softmax: Whether the weights of a row's events sum to one. Without, they are what the MLP
            says, and may be negative.

    Raises:
        ValueError: If a layer would have no unit, or the activation is not known.
    """

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        softmax: bool = True,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.mlp = MLP(4 * width, units, activation=activation, dropout=dropout)

    def weights(self, target_BW: Tensor, events_TW: Tensor, layout: Layout) -> Tensor:
        """Return ``(T,)``, the weight of each event."""
        scores_T = self.mlp(compare(target_BW, events_TW, layout.row, layout.offsets))
        return softmax_rows(scores_T, layout) if self.softmax else scores_T

    def forward(self, target_BW: Tensor, events_TW: Tensor, layout: Layout) -> Tensor:
        """Return ``(B, W)``, the weighted sum of each row's events; zero where there is none."""
        weights_T = self.weights(target_BW, events_TW, layout)
        return sum_rows(weights_T.unsqueeze(1) * events_TW, layout.offsets)

    def of_all(self, target_BW: Tensor, events_TW: Tensor) -> Tensor:
        """As ``forward``, ``(B, W)``, where all rows have the same events.

        The first map splits: ``M [t, h, t - h, t * h]``, with ``M`` in four parts, is ``(M_1 + M_3
        + M_4 diag(h)) t + (M_2 - M_3) h``. What it says of the events is computed once, and no row
        is laid beside each of them. A map with experts takes them side by side.
        """
        first, *others = self.mlp.hidden
        rows, events = target_BW.shape[0], events_TW.shape[0]
        if type(first) is nn.Linear:
            by_t_HW, by_h_HW, by_minus_HW, by_times_HW = first.weight.chunk(4, dim=1)
            maps_THW = by_t_HW + by_minus_HW + by_times_HW * events_TW.unsqueeze(1)
            of_events_TH = F.linear(events_TW, by_h_HW - by_minus_HW, first.bias)
            hidden_BF = F.linear(target_BW, maps_THW.flatten(0, 1), of_events_TH.flatten())
            hidden_NH = hidden_BF.view(rows * events, first.out_features)
        else:
            beside = (target_BW.repeat_interleave(events, dim=0), events_TW.repeat(rows, 1))
            target_NW, events_NW = beside
            parts = [target_NW, events_NW, target_NW - events_NW, target_NW * events_NW]
            hidden_NH = first(torch.cat(parts, dim=1))
        for layer in others:
            hidden_NH = layer(hidden_NH)
        scores_BT = self.mlp.output(hidden_NH).view(rows, events)
        weights_BT = scores_BT.softmax(dim=1) if self.softmax else scores_BT
        return weights_BT @ events_TW


def compare(target_BW: Tensor, events_TW: Tensor, row_T: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(T, 4 W)``: each event beside its row's target, less it, and times it.

    Args:
        target_BW: One target a row.
        events_TW: Row after row.
        row_T: The row of each event.
        offsets: ``(B + 1,)``, where each row's events begin.
    """
    return _Compare.apply(target_BW, events_TW, row_T, offsets)


class _Compare(torch.autograd.Function):
    """One pass each way, where autograd would make and keep every part, and sum row by row."""

    @staticmethod
    def forward(ctx, target_BW, events_TW, row_T, offsets):
        ctx.save_for_backward(target_BW, events_TW, row_T, offsets)
        target_TW = target_BW.index_select(0, row_T)
        difference_TW, product_TW = target_TW - events_TW, target_TW * events_TW
        return torch.cat([target_TW, events_TW, difference_TW, product_TW], dim=1)

    @staticmethod
    def backward(ctx, grad_T4W):
        target_BW, events_TW, row_T, offsets = ctx.saved_tensors
        target_grad_TW, event_grad_TW, difference_TW, product_TW = grad_T4W.chunk(4, dim=1)
        to_target_TW = (target_grad_TW + difference_TW).addcmul_(events_TW, product_TW)
        to_event_TW = event_grad_TW - difference_TW
        to_event_TW.addcmul_(target_BW.index_select(0, row_T), product_TW)
        return sum_rows(to_target_TW, offsets), to_event_TW, None, None


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
