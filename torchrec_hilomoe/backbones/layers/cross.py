"""DCN-v2 (Wang et al., 2021, arXiv 2008.13535): explicit crosses of features.

A layer's full matrix is an ``nn.Linear``, so that it can carry experts.

Shape legend:
    B  rows
    D  width
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.mlp import Activation, hidden_layers

__all__ = ["CrossHead", "CrossNetwork"]


class CrossNetwork(nn.Module):
    r"""Polynomials of the input, a degree higher with every layer.

    .. math:: x_{l+1} = x_l + x_0 \odot (W_l x_l + b_l)

    Args:
        width: ``D``.
        num_layers: At least 1; the last one's output has degree ``num_layers + 1``.

    Shape:
        - input ``(B, D)``, output ``(B, D)``

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> CrossNetwork(6, 2)(torch.randn(3, 6)).shape
        torch.Size([3, 6])
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"CrossNetwork.num_layers must be at least 1, got {num_layers}.")
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return ``(B, D)``."""
        crossed_BD = x_BD
        for layer in self.layers:
            crossed_BD = torch.addcmul(crossed_BD, x_BD, layer(crossed_BD))
        return crossed_BD


class CrossHead(nn.Module):
    """A cross network beside hidden layers, both on the same input; one linear map reads both.

    Args:
        in_features: ``D``.
        hidden: Widths of the hidden layers; with none, the output reads the input as well.
        cross_layers: Layers of the cross network; at least 1.
        activation: Of the hidden layers.
        dropout: Share of hidden units dropped in training.
        batch_norm: Whether the hidden layers are normalised.

    Shape:
        - input ``(B, D)``, output ``(B,)``

    Raises:
        ValueError: If a layer would have no unit, or there is no cross layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        cross_layers: int = 3,
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.cross = CrossNetwork(in_features, cross_layers)
        self.hidden = hidden_layers(
            in_features, hidden, activation=activation, dropout=dropout, batch_norm=batch_norm
        )
        self.output = nn.Linear(in_features + (hidden[-1] if hidden else in_features), 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return one number a row."""
        return self.output(torch.cat([self.cross(x_BD), self.hidden(x_BD)], dim=1)).squeeze(-1)
