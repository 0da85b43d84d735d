"""DHEN (Zhang et al., 2022, arXiv 2203.11014): an ensemble of feature interactions, layer on layer.

Shape legend:
    B  rows
    M  tokens: fields, each one vector
    S  tokens of a summary of something else
    A  all of them
    D  width of a token
    P  pairs of tokens: M (M - 1) / 2
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.cross import CrossNetwork
from torchrec_hilomoe.backbones.layers.gating import two_layers

__all__ = ["DHENLayer", "Interaction"]


class DHENLayer(nn.Module):
    r"""Pairwise products and a cross layer of the same tokens, added up beside a shortcut.

    .. math:: Y = \mathrm{norm}(\mathrm{dot}(X) + \mathrm{cross}(X) + X)

    ``dot`` maps the products of all pairs of different tokens linearly to ``M`` tokens; ``cross``
    is one layer of DCN-v2 on the tokens joined into one vector, so any feature of any token can
    meet any other. Of DHEN's ways to join the modules, the sum needs no map and keeps the shape, so
    that layers stack. ``norm`` is over each token.

    Args:
        num_tokens: ``M``.
        width: ``D``.

    Shape:
        - input and output ``(B, M, D)``
    """

    pairs: Tensor

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        first_P, second_P = torch.triu_indices(num_tokens, num_tokens, offset=1)
        # Places of the pairs among the M * M products.
        self.register_buffer("pairs", first_P * num_tokens + second_P, persistent=False)
        self.dot = nn.Linear(self.pairs.shape[0], num_tokens * width)
        self.cross = CrossNetwork(num_tokens * width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BMD: Tensor) -> Tensor:
        """Interact; shapes are in the class docstring."""
        products_BMM = torch.bmm(x_BMD, x_BMD.transpose(1, 2))
        pairs_BP = products_BMM.flatten(1).index_select(1, self.pairs)
        flat_BX = x_BMD.flatten(1)
        joined_BX = self.dot(pairs_BP) + self.cross(flat_BX) + flat_BX
        return self.norm(joined_BX.view_as(x_BMD))


class Interaction(nn.Module):
    """Layers of DHEN over tokens and those of a summary, then an MLP back to the tokens.

    Args:
        num_tokens: ``M``, the summary's not included.
        summary: Tokens of the summary, ``S``.
        width: ``D``.
        num_layers: Of DHEN.
        dropout: After the MLP.

    Shape:
        - inputs ``(B, M, D)`` and ``(B, S, D)``, output ``(B, M, D)``
    """

    def __init__(
        self, num_tokens: int, summary: int, width: int, *, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        together = num_tokens + summary
        self.layers = nn.Sequential(*(DHENLayer(together, width) for _ in range(num_layers)))
        self.update = two_layers(together * width, num_tokens * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BMD: Tensor, summary_BSD: Tensor) -> Tensor:
        """Interact; shapes are in the class docstring."""
        mixed_BAD = self.layers(torch.cat([x_BMD, summary_BSD], dim=1))
        return self.dropout(self.update(mixed_BAD.flatten(1))).view_as(x_BMD)
