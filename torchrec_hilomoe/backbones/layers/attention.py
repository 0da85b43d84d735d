"""Multi-head self-attention over jagged rows, written with four linear maps.

``nn.MultiheadAttention`` keeps its in-projection as a bare parameter; four ``nn.Linear`` can
carry experts. They work on the tokens there are; only the product of queries and keys pads.

Shape legend:
    N  tokens of all rows together
    W  width
    B  rows
    L  the longest row of the batch
    H  heads
"""

from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.jagged import pad, unpad, valid
from torchrec_hilomoe.backbones.layers.rotary import rotate, Rotation

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Tokens of a row attend to every token of the same row.

    Args:
        width: ``W``.
        num_heads: ``H``; divides ``W``.
        dropout: Share of attention weights dropped in training.
        targets_only: Whether only each row's first token, its target, asks. The others are then
            neither queried nor returned, which is all that a last layer needs whose output is
            the target's.

    Raises:
        ValueError: If there is no head, or the heads do not divide the width.
    """

    def __init__(
        self, width: int, num_heads: int, *, dropout: float = 0.0, targets_only: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"SelfAttention.num_heads must be at least 1, got {num_heads}.")
        if width % num_heads:
            raise ValueError(
                f"SelfAttention.num_heads must divide width, got num_heads={num_heads} and "
                f"width={width}. Change the heads or model.embedding_dim."
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.targets_only = targets_only
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x_NW: Tensor,
        offsets: Tensor,
        longest: int,
        visible_BL: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Return ``(N, W)``, or ``(B, W)`` if ``targets_only``.

        Args:
            x_NW: Tokens, row after row.
            offsets: ``(B + 1,)``, where each row begins.
            longest: ``L``.
            visible_BL: Booleans: which tokens are attended to, at least one a row; all by default.
            rotation: Turns queries and keys by their tokens' positions.
        """
        if visible_BL is None:
            visible_BL = valid(offsets, longest)
        key_NW = self.key(x_NW)
        if self.targets_only:
            assert rotation is None
            query_BLW = self.query(x_NW[offsets[:-1]]).unsqueeze(1)
        else:
            query_NW = self.query(x_NW)
            if rotation is not None:
                query_NW = rotate(query_NW, rotation, self.num_heads)
                key_NW = rotate(key_NW, rotation, self.num_heads)
            query_BLW = pad(query_NW, offsets, longest)
        attended_BHLD = F.scaled_dot_product_attention(
            self._heads(query_BLW),
            self._heads(pad(key_NW, offsets, longest)),
            self._heads(pad(self.value(x_NW), offsets, longest)),
            attn_mask=visible_BL[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended_BLW = attended_BHLD.transpose(1, 2).flatten(2)
        if self.targets_only:
            return self.output(attended_BLW.squeeze(1))
        return self.output(unpad(attended_BLW, offsets, x_NW.shape[0]))

    def _heads(self, x_BLW: Tensor) -> Tensor:
        return x_BLW.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
