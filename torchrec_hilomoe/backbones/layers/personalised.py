"""The history's side of an InterFormer layer: a map made for the row, then self-attention.

Shape legend:
    B  rows
    N  tokens of all rows together
    C  tokens of the context's summary
    D  width of a token
    L  the longest row of the batch
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.attention import SelfAttention
from torchrec_hilomoe.backbones.layers.cls_tokens import Places
from torchrec_hilomoe.backbones.layers.jagged import pad, unpad

__all__ = ["HistoryLayer", "PersonalisedFFN"]


class PersonalisedFFN(nn.Module):
    """A ``D x D`` map of each row, made of the context's summary, applied to the row's tokens.

    The map is the summary's tokens as columns times a learned ``C x D`` matrix. Applying first the
    matrix and then the columns is the same, for ``2 C D`` products a token instead of ``D * D`` and
    ``C * D * D`` a row.

    Args:
        width: ``D``.
        summary: ``C``.
    """

    def __init__(self, width: int, summary: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(width, summary, bias=False)

    def forward(self, x_ND: Tensor, summary_BCD: Tensor, places: Places) -> Tensor:
        """Return ``(N, D)``."""
        weights_BLC = pad(self.weigh(x_ND), places.offsets, places.longest)
        return unpad(torch.bmm(weights_BLC, summary_BCD), places.offsets, x_ND.shape[0])


class HistoryLayer(nn.Module):
    """A personalised map, then self-attention with rotary positions.

    Args:
        width: ``D``.
        summary: ``C``.
        num_heads: Attention heads.
        residual: Whether each half adds to its input.
        dropout: Of attention weights, and after the attention.
    """

    def __init__(
        self, width: int, summary: int, *, num_heads: int, residual: bool, dropout: float
    ) -> None:
        super().__init__()
        self.residual = residual
        self.ffn = PersonalisedFFN(width, summary)
        self.attention = SelfAttention(width, num_heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_ND: Tensor, summary_BCD: Tensor, places: Places) -> Tensor:
        """Return the next layer's tokens, ``(N, D)``."""
        mapped_ND = self.ffn(x_ND, summary_BCD, places)
        x_ND = x_ND + mapped_ND if self.residual else mapped_ND
        attended_ND = self.attention(x_ND, places.offsets, places.longest, rotation=places.rotation)
        attended_ND = self.dropout(attended_ND)
        return x_ND + attended_ND if self.residual else attended_ND
