"""InterFormer's gate, and the MLP that it and its neighbours share.

Shape legend:
    B  rows
    A  tokens of a row
    D  width of a token
"""

from typing import Literal

import torch
from torch import nn, Tensor

__all__ = ["Gate", "Gating", "two_layers"]

Gating = Literal["printed", "self"]


def two_layers(in_features: int, out_features: int) -> nn.Sequential:
    """An MLP whose one hidden layer, with Swish, is as wide as its output."""
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )


class Gate(nn.Module):
    r"""Let a token decide what of itself is passed on.

    ``"printed"`` is the paper's equation, whose values are between 0 and 1; ``"self"`` is what
    self-gating means elsewhere, which keeps a token's own values. With an MLP ``F``:

    .. math:: \sigma(x \odot F(x)) \quad \text{or} \quad x \odot \sigma(F(x))

    Args:
        width: ``D``.
        form: Which of them.

    Shape:
        - input and output ``(B, A, D)``

    Raises:
        ValueError: If the form is not known.
    """

    def __init__(self, width: int, form: Gating) -> None:
        super().__init__()
        if form not in ("printed", "self"):
            raise ValueError(f"InterFormer.gating must be 'printed' or 'self', got {form!r}.")
        self.form = form
        self.mlp = two_layers(width, width)

    def forward(self, x_BAD: Tensor) -> Tensor:
        """Gate; shapes are in the class docstring."""
        if self.form == "printed":
            return torch.sigmoid(x_BAD * self.mlp(x_BAD))
        return x_BAD * torch.sigmoid(self.mlp(x_BAD))
