"""What InterFormer's two sides tell each other: a few gated tokens of each (its Cross Arch).

Some are pooled by attention (Lee et al., 2019, arXiv 1810.00825): learned questions to a set.

Shape legend:
    N  tokens of all rows together: of each row its CLS tokens, then its events, oldest first
    X  tokens of the context
    C  tokens of the context's summary, which are also the CLS tokens
    Q  pooled tokens, learned questions
    R  recent tokens
    S  tokens of the history's summary: C + Q + R
    D  width of a token, W in the pooling
    B  rows     L  the longest row of the batch     H  heads
"""

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.cls_tokens import Places, TokenCounts
from torchrec_hilomoe.backbones.layers.gating import Gate, Gating, two_layers
from torchrec_hilomoe.backbones.layers.jagged import pad, valid

__all__ = ["AttentionPooling", "ContextSummary", "HistorySummary"]


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
        pooled_BQD = self.pool(x_ND, places.offsets, places.max_seqlen)
        return self.gate(torch.cat([cls_BCD, pooled_BQD, recent_BRD], dim=1))


class AttentionPooling(nn.Module):
    """Each row's tokens, as many as there are and in any order, become ``Q`` vectors.

    The questions are parameters, so a map of them would add nothing: there are three linear maps,
    not four.

    Args:
        width: ``W``.
        num_heads: ``H``; divides ``W``.
        num_queries: ``Q``; with 0 the result is empty.
        dropout: Share of attention weights dropped in training.
    """

    def __init__(
        self, width: int, num_heads: int, num_queries: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        assert width % num_heads == 0, (width, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        nn.init.normal_(self.queries)  # of the size of normalised tokens, as if mapped from them

    def forward(self, x_NW: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
        """Return ``(B, Q, W)``.

        Args:
            x_NW: Tokens, row after row; at least one in each.
            offsets: ``(B + 1,)``, where each row begins.
            max_seqlen: ``L``.
        """
        query_BQW = self.queries.expand(offsets.shape[0] - 1, -1, -1)
        pooled_BHQD = F.scaled_dot_product_attention(
            self._heads(query_BQW),
            self._heads(pad(self.key(x_NW), offsets, max_seqlen)),
            self._heads(pad(self.value(x_NW), offsets, max_seqlen)),
            attn_mask=valid(offsets, max_seqlen)[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(pooled_BHQD.transpose(1, 2).flatten(2))

    def _heads(self, x_BLW: Tensor) -> Tensor:
        return x_BLW.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
