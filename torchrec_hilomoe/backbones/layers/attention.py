"""Multi-head self-attention over jagged rows, written with four linear maps.

``nn.MultiheadAttention`` keeps its in-projection as a bare parameter; four ``nn.Linear`` can
carry experts. They work on the tokens there are; only the product of queries and keys pads. So does
the layer of the transformer's encoder around it (Vaswani et al., 2017), where
``nn.TransformerEncoderLayer`` has a map into the attention that can carry no experts. Positions may
be rotary (Su et al., 2021, arXiv 2104.09864): products then tell how far apart tokens are.

Shape legend:
    N  tokens of all rows together
    W  width
    B  rows
    L  the longest row of the batch
    H  heads
    P  pairs of features in a head: W / H / 2
    F  hidden width of the feed-forward map
"""

from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.layers.jagged import pad, unpad, valid

__all__ = ["EncoderLayer", "Rotation", "SelfAttention", "rotate", "rotation_of"]


BASE = 10_000.0


@dataclass(frozen=True)
class Rotation:
    """How far each token's pairs of features are turned; the same in every head and layer.

    Attributes:
        cosines: ``(N, P)``.
        sines: ``(N, P)``.
    """

    cosines: Tensor
    sines: Tensor


def rotation_of(positions_N: Tensor, head_width: int, dtype: torch.dtype) -> Rotation:
    """Turn pair ``p`` of a token at position ``t`` by ``t * 10000 ** (-p / P)``.

    Args:
        positions_N: Integers; only their differences within a row matter.
        head_width: Features of a head, ``2 P``.
        dtype: Of the result. Angles are always float32: bfloat16 cannot tell 256 from 257.
    """
    assert head_width % 2 == 0, head_width
    pairs = head_width // 2
    exponents_P = torch.arange(pairs, dtype=torch.float32, device=positions_N.device) / pairs
    angles_NP = positions_N.float().unsqueeze(1) * BASE**-exponents_P
    return Rotation(cosines=angles_NP.cos().to(dtype), sines=angles_NP.sin().to(dtype))


def rotate(x_NW: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
    """Turn each head's features, of which ``p`` and ``p + P`` are a pair; ``(N, W)``."""
    first_NHP, second_NHP = x_NW.unflatten(1, (num_heads, -1)).chunk(2, dim=2)
    cosines, sines = rotation.cosines.unsqueeze(1), rotation.sines.unsqueeze(1)
    turned = [
        first_NHP * cosines - second_NHP * sines,
        second_NHP * cosines + first_NHP * sines,
    ]
    return torch.cat(turned, dim=2).flatten(1)


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
        max_seqlen: int,
        visible_BL: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Return ``(N, W)``, or ``(B, W)`` if ``targets_only``.

        Args:
            x_NW: Tokens, row after row.
            offsets: ``(B + 1,)``, where each row begins.
            max_seqlen: ``L``.
            visible_BL: Booleans: which tokens are attended to, at least one a row; all by default.
            rotation: Turns queries and keys by their tokens' positions.
        """
        if visible_BL is None:
            visible_BL = valid(offsets, max_seqlen)
        key_NW = self.key(x_NW)
        if self.targets_only:
            assert rotation is None
            query_BLW = self.query(x_NW[offsets[:-1]]).unsqueeze(1)
        else:
            query_NW = self.query(x_NW)
            if rotation is not None:
                query_NW = rotate(query_NW, rotation, self.num_heads)
                key_NW = rotate(key_NW, rotation, self.num_heads)
            query_BLW = pad(query_NW, offsets, max_seqlen)
        attended_BHLD = F.scaled_dot_product_attention(
            self._heads(query_BLW),
            self._heads(pad(key_NW, offsets, max_seqlen)),
            self._heads(pad(self.value(x_NW), offsets, max_seqlen)),
            attn_mask=visible_BL[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended_BLW = attended_BHLD.transpose(1, 2).flatten(2)
        if self.targets_only:
            return self.output(attended_BLW.squeeze(1))
        return self.output(unpad(attended_BLW, offsets, x_NW.shape[0]))

    def of_all(self, target_BW: Tensor, events_NW: Tensor) -> Tensor:
        """What each row's target attends to: itself and events that all rows have, ``(B, W)``.

        As ``forward`` if ``targets_only``, with keys and values of the events computed once.
        """
        query_BHD, own_BHD, value_BHD = (
            part(target_BW).unflatten(1, (self.num_heads, -1))
            for part in (self.query, self.key, self.value)
        )
        keys_HNE, values_HNE = (
            part(events_NW).unflatten(1, (self.num_heads, -1)).transpose(0, 1)
            for part in (self.key, self.value)
        )
        query_BHD = query_BHD * query_BHD.shape[2] ** -0.5
        own_BH1 = (query_BHD * own_BHD).sum(dim=2, keepdim=True)
        events_HBN = query_BHD.transpose(0, 1) @ keys_HNE.transpose(1, 2)
        shares_HBL = torch.cat([own_BH1.transpose(0, 1), events_HBN], dim=2).softmax(dim=2)
        of_events_HBE = shares_HBL[:, :, 1:] @ values_HNE
        attended_HBE = of_events_HBE + shares_HBL[:, :, :1] * value_BHD.transpose(0, 1)
        return self.output(attended_HBE.transpose(0, 1).flatten(1))

    def _heads(self, x_BLW: Tensor) -> Tensor:
        return x_BLW.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


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

    def forward(self, x_NW: Tensor, offsets: Tensor, max_seqlen: int, visible_BL: Tensor) -> Tensor:
        """Return ``(N, W)``; arguments as in :class:`SelfAttention`."""
        attended_NW = self.attention(x_NW, offsets, max_seqlen, visible_BL)
        x_NW = self.norm_attention(x_NW + self.dropout(attended_NW))
        hidden_NF = self.dropout(F.relu(self.ffn_in(x_NW)))
        return self.norm_ffn(x_NW + self.dropout(self.ffn_out(hidden_NF)))
