"""A layer of the transformer's encoder (Vaswani et al., 2017), over jagged rows.

``nn.TransformerEncoderLayer`` computes the same of padded ones, with a map into the attention that
can carry no experts.

Shape legend:
    N  tokens of all rows together
    W  width of a token
    B  rows
    L  most tokens in a row
    F  hidden width of the feed-forward map
"""

from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.attention import SelfAttention

__all__ = ["EncoderLayer"]


class EncoderLayer(nn.Module):
    """Self-attention, then ``W -> F -> W`` with ReLU; each adds to its input, then a norm.

    Args:
        width: ``W``.
        num_heads: Attention heads.
        ffn_width: ``F``.
        dropout: Of attention weights, after the attention, and inside and after the feed-forward.
    """

    def __init__(self, width: int, num_heads: int, ffn_width: int, *, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, dropout=dropout)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)

    def forward(self, x_NW: Tensor, offsets: Tensor, longest: int, visible_BL: Tensor) -> Tensor:
        """Return ``(N, W)``; arguments as in :class:`SelfAttention`."""
        attended_NW = self.attention(x_NW, offsets, longest, visible_BL)
        x_NW = self.norm_attention(x_NW + self.dropout(attended_NW))
        hidden_NF = self.dropout(F.relu(self.ffn_in(x_NW)))
        return self.norm_ffn(x_NW + self.dropout(self.ffn_out(hidden_NF)))
