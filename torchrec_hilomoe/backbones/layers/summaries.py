"""What InterFormer's two sides tell each other: a few gated tokens of each (its Cross Arch).

Shape legend:
    B  rows
    N  tokens of all rows together: of each row its CLS tokens, then its events, oldest first
    X  tokens of the context
    C  tokens of the context's summary, which are also the CLS tokens
    Q  pooled tokens
    R  recent tokens
    S  tokens of the history's summary: C + Q + R
    D  width of a token
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.cls_tokens import Places, TokenCounts
from torchrec_hilomoe.backbones.layers.gating import Gate, Gating, two_layers
from torchrec_hilomoe.backbones.layers.pooling import AttentionPooling

__all__ = ["ContextSummary", "HistorySummary"]


class ContextSummary(nn.Module):
    """Mix the context's tokens, every feature alike, and gate what comes out.

    Args:
        counts: ``X`` and ``C``.
        width: ``D``.
        gating: See :class:`~torchrec_hilomoe.backbones.layers.gating.Gate`.

    Shape:
        - input ``(B, X, D)``, output ``(B, C, D)``
    """

    def __init__(self, counts: TokenCounts, width: int, gating: Gating) -> None:
        super().__init__()
        self.mix = two_layers(counts.context, counts.cls)
        self.gate = Gate(width, gating)

    def forward(self, x_BXD: Tensor) -> Tensor:
        """Summarise; shapes are in the class docstring."""
        return self.gate(self.mix(x_BXD.transpose(1, 2)).transpose(1, 2))


class HistorySummary(nn.Module):
    """Gate the history's CLS tokens, its pooled tokens, and the tokens of its latest events.

    A row without events pools its CLS tokens; its recent tokens are zeros before the gate.

    Args:
        counts: ``C``, ``Q`` and ``R``.
        width: ``D``.
        num_heads: Of attention pooling; divides ``D``.
        gating: See :class:`~torchrec_hilomoe.backbones.layers.gating.Gate`.
        dropout: Share of attention pooling's weights dropped in training.
    """

    def __init__(
        self, counts: TokenCounts, width: int, *, num_heads: int, gating: Gating, dropout: float
    ) -> None:
        super().__init__()
        self.counts = counts
        self.pool = AttentionPooling(width, num_heads, counts.pooled, dropout=dropout)
        self.gate = Gate(width, gating)

    def forward(self, x_ND: Tensor, places: Places) -> Tensor:
        """Return ``(B, S, D)``."""
        parts = [self.counts.cls, self.counts.recent]
        ends_BED = x_ND.index_select(0, places.ends.flatten()).unflatten(0, (-1, sum(parts)))
        cls_BCD, recent_BRD = torch.where(places.exists, ends_BED, 0).split(parts, dim=1)
        pooled_BQD = self.pool(x_ND, places.offsets, places.longest)
        return self.gate(torch.cat([cls_BCD, pooled_BQD, recent_BRD], dim=1))
