"""Pooling by multi-head attention (Lee et al., 2019, arXiv 1810.00825): learned questions to a set.

Shape legend:
    B  rows
    N  tokens of all rows together
    L  the longest row of the batch
    W  width
    Q  questions
    H  heads
"""

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.jagged import pad, valid

__all__ = ["AttentionPooling"]


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

    def forward(self, x_NW: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Return ``(B, Q, W)``.

        Args:
            x_NW: Tokens, row after row; at least one in each.
            offsets: ``(B + 1,)``, where each row begins.
            longest: ``L``.
        """
        query_BQW = self.queries.expand(offsets.shape[0] - 1, -1, -1)
        pooled_BHQD = F.scaled_dot_product_attention(
            self._heads(query_BQW),
            self._heads(pad(self.key(x_NW), offsets, longest)),
            self._heads(pad(self.value(x_NW), offsets, longest)),
            attn_mask=valid(offsets, longest)[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(pooled_BHQD.transpose(1, 2).flatten(2))

    def _heads(self, x_BLW: Tensor) -> Tensor:
        return x_BLW.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
