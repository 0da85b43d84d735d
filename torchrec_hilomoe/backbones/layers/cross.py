"""DCN-v2 (Wang et al., 2021, arXiv 2008.13535): explicit crosses of features.

A layer's matrices are ``nn.Linear``, so that they can carry experts.

Shape legend:
    B  rows
    D  width
    R  rank of a layer's matrix
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.mlp import Activation, hidden_layers

__all__ = ["CrossHead", "CrossNetwork"]


class CrossNetwork(nn.Module):
    r"""Polynomials of the input, a degree higher with every layer.

    .. math:: x_{l+1} = x_l + x_0 \odot (W_l x_l + b_l)

    With a low rank, ``W_l`` is a product of two narrow matrices, as in TorchRec's
    ``LowRankCrossNet``, whose parameters are no ``nn.Linear``.

    Args:
        width: ``D``.
        num_layers: At least 1; the last one's output has degree ``num_layers + 1``.
        low_rank: ``R``, the rank of each ``W_l``; None gives it a full matrix.

    Shape:
        - input ``(B, D)``, output ``(B, D)``

    Raises:
        ValueError: If there is no layer, or no rank.

    Example:
        >>> CrossNetwork(6, 2)(torch.randn(3, 6)).shape
        torch.Size([3, 6])
    """

    def __init__(self, width: int, num_layers: int, *, low_rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"CrossNetwork.num_layers must be at least 1, got {num_layers}.")
        if low_rank is not None and low_rank < 1:
            raise ValueError(
                f"CrossNetwork.low_rank must be at least 1, or null for full matrices, got "
                f"{low_rank}."
            )
        self.layers = nn.ModuleList(_square_map(width, low_rank) for _ in range(num_layers))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return ``(B, D)``."""
        crossed_BD = x_BD
        for layer in self.layers:
            crossed_BD = torch.addcmul(crossed_BD, x_BD, layer(crossed_BD))
        return crossed_BD


def _square_map(width: int, low_rank: int | None) -> nn.Module:
    if low_rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, low_rank, bias=False), nn.Linear(low_rank, width))


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
