"""DIEN's auxiliary loss: a state should know the event that comes next from one that does not.

**Negatives** are drawn from the rank's own batch: for each event, one of the events of the other
rows, all equally likely, so that popular items are drawn as often as they occur. They come from
torch's random state of the device, so a resumed run draws the same. An event counts if there is an
event before it in its row, and an event in another row.

Shape legend:
    B  rows
    T  events of all rows together
    W  width of an event and of a state
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.jagged import Layout
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP
from torchrec_hilomoe.hilomoe.losses import AttachedLoss

__all__ = ["NextEventLoss", "foreign_events"]

# Opaque to FX: it draws as many numbers as there are events, which a proxy does not know.
torch.fx.wrap("foreign_events")


class NextEventLoss(nn.Module):
    """Binary cross-entropy of an MLP over ``[state, event]``, for the next event and for another.

    It is the mean of ``-log p(next) - log(1 - p(other))`` over the counting events of all ranks.

    Args:
        width: ``W``.
        weight: Of the loss beside the host's.
        hidden: Widths of the MLP.
        activation: Of its hidden layers.
    """

    def __init__(
        self,
        width: int,
        weight: float,
        *,
        hidden: Sequence[int] = (100, 50),
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        self.mlp = MLP(2 * width, hidden, activation=activation)
        self.attached = AttachedLoss(weight)

    def forward(
        self, carrier: Tensor, states_TW: Tensor, events_TW: Tensor, layout: Layout
    ) -> Tensor:
        """Return ``carrier``, with the loss hanging on it where there is something to learn.

        Args:
            carrier: What the host's loss depends on.
            states_TW: After each event.
            events_TW: Row after row, oldest first.
            layout: Whose they are.
        """
        if not self.attached.learns:
            return carrier
        other_T = foreign_events(layout.row, layout.offsets)
        counts_T = _follows(layout) & _has_others(layout)
        before_TW = torch.roll(states_TW, 1, dims=0)
        seen_T = self.mlp(torch.cat([before_TW, events_TW], dim=1))
        unseen_T = self.mlp(torch.cat([before_TW, events_TW[other_T]], dim=1))
        lost_T = F.softplus(-seen_T) + F.softplus(unseen_T)
        return self.attached(carrier, (lost_T * counts_T).sum(), counts_T.sum())


def foreign_events(row_T: Tensor, offsets: Tensor) -> Tensor:
    """Return ``(T,)`` int64: for each event, one drawn from the events of the other rows.

    They follow upon the row's own, if what comes after the last event is the first one. Where no
    other row has an event, there is nothing to draw, and some event is returned.

    Args:
        row_T: The row of each event.
        offsets: ``(B + 1,)``, where each row's events begin.
    """
    ends_T, total = offsets[1:][row_T], row_T.shape[0]
    others_T = total - (ends_T - offsets[row_T])
    drawn_T = torch.randint(2**62, (total,), device=row_T.device) % others_T.clamp(min=1)
    return (ends_T + drawn_T) % max(total, 1)


def _follows(layout: Layout) -> Tensor:
    """``(T,)``: whether the event before is of the same row."""
    return torch.cat([layout.row[:1] < 0, layout.row[1:] == layout.row[:-1]])


def _has_others(layout: Layout) -> Tensor:
    """``(T,)``: whether another row has an event."""
    lengths_B = layout.offsets[1:] - layout.offsets[:-1]
    return (layout.offsets[-1:] > lengths_B)[layout.row]
