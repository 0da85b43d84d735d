"""A gated recurrent unit over jagged rows; with an attention, DIEN's AUGRU.

Shape legend:
    B  rows
    T  events of all rows together
    W  width of an event and of a state
"""

import math

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.recurrence import recur, States

__all__ = ["GRU"]


class GRU(nn.Module):
    """Each row's events move a state that starts at zero; see :mod:`.recurrence`.

    Args:
        width: ``W``.

    Attributes:
        input: The events' part of the gates, update, reset and new one below the other. It works
            on all events at once, so it can carry experts.
        hidden_weight: ``(3 W, W)``, the state's part. It works inside the recurrence, where a
            step waits for the one before, so it is a bare parameter and no place for experts.
        hidden_bias: ``(3 W,)``.

    Example:
        >>> gru = GRU(4)
        >>> states = gru(torch.randn(5, 4), torch.tensor([0, 2, 2, 5]))
        >>> states.every.shape, states.last[1]
        (torch.Size([5, 4]), tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>))
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)
        self.hidden_weight = nn.Parameter(torch.empty(3 * width, width))
        self.hidden_bias = nn.Parameter(torch.empty(3 * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as `nn.GRU` does: all parameters uniform up to one over the root of the width."""
        bound = 1 / math.sqrt(self.hidden_weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, events_TW: Tensor, offsets: Tensor, attention_T: Tensor | None = None
    ) -> States:
        """Run over the rows.

        Args:
            events_TW: Row after row, oldest first.
            offsets: ``(B + 1,)``, where each row's events begin.
            attention_T: How much each event may move its row's state, 0 not at all; None lets
                each as much as its own gate does.
        """
        inputs_TG = self.input(events_TW)
        return recur(inputs_TG, self.hidden_weight, self.hidden_bias, attention_T, offsets)
