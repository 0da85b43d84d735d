"""BST, the Behaviour Sequence Transformer (Chen et al., 2019, arXiv 1905.06874).

The definition follows BARS's tuned runs of it: positions are concatenated, not added, and
layer norm is off by default.

Shape legend:
    B  rows
    N  tokens of all rows together: events and one target a row
    W  width of a token: event fields and a position, each one embedding wide
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.base import Backbone, check_histories, HookPoint
from torchrec_hilomoe.backbones.layers.attention import SelfAttention
from torchrec_hilomoe.backbones.layers.jagged import Tokens, tokens_of
from torchrec_hilomoe.backbones.layers.mlp import MLP
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures

__all__ = ["BST", "Transformer", "TransformerLayer"]


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward map ``W -> W -> W`` with leaky ReLU.

    Args:
        width: ``W``.
        num_heads: Attention heads.
        dropout: After the attention and after the feed-forward map.
        residual: Whether each half adds to its input.
        layer_norm: Whether each half is normalised.
        targets_only: Whether only each row's target is computed, as for a last layer whose other
            tokens nobody reads.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float,
        residual: bool,
        layer_norm: bool,
        targets_only: bool,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.targets_only = targets_only
        self.attention = SelfAttention(width, num_heads, dropout=dropout, targets_only=targets_only)
        self.ffn_in = nn.Linear(width, width)
        self.ffn_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm_attention = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.norm_ffn = nn.LayerNorm(width) if layer_norm else nn.Identity()

    def forward(self, x_NW: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
        """Return ``(N, W)``, or ``(B, W)`` if ``targets_only``; see :class:`SelfAttention`."""
        attended_NW = self.attention(x_NW, offsets, max_seqlen)
        return self._mapped(x_NW[offsets[:-1]] if self.targets_only else x_NW, attended_NW)

    def of_all(self, target_BW: Tensor, events_TW: Tensor) -> Tensor:
        """As ``forward`` if ``targets_only``, where all rows have the same events."""
        return self._mapped(target_BW, self.attention.of_all(target_BW, events_TW))

    def _mapped(self, x_NW: Tensor, attended_NW: Tensor) -> Tensor:
        attended_NW = self.dropout(attended_NW)
        hidden_NW = self.norm_attention(x_NW + attended_NW if self.residual else attended_NW)
        mapped_NW = self.dropout(self.ffn_out(F.leaky_relu(self.ffn_in(hidden_NW))))
        return self.norm_ffn(hidden_NW + mapped_NW if self.residual else mapped_NW)


class Transformer(nn.Module):
    """Layers one after the other.

    Args:
        layers: Each with its own parameters.
    """

    def __init__(self, layers: Iterable[TransformerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_NW: Tensor, offsets: Tensor, max_seqlen: int) -> Tensor:
        """Return what the last layer returns; arguments as in :class:`SelfAttention`."""
        for layer in self.layers:
            x_NW = layer(x_NW, offsets, max_seqlen)
        return x_NW

    def of_all(self, target_BW: Tensor, events_TW: Tensor) -> Tensor:
        """As ``forward``, where all rows have the same events and there is a layer for targets."""
        (layer,) = self.layers
        assert isinstance(layer, TransformerLayer)
        return layer.of_all(target_BW, events_TW)


class BST(Backbone):
    """A transformer over each history with the target as one more token; then an MLP head.

    Args:
        widths: Sizes of the features.
        position_dim: Width of a position's vector; None is an embedding's, as in the published
            runs, 0 leaves positions out.
        num_layers: Transformer layers over each history; at least 1.
        num_heads: Attention heads; must divide the width of a token.
        dropout: Inside the transformer; None is ``head_dropout``.
        head_dropout: Inside the head.
        residual: Whether attention and feed-forward add to their inputs.
        layer_norm: Whether they are normalised.
        pooling: ``"target"`` keeps the target's token, ``"mean"`` averages all of them.
        head: Hidden widths of the head.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If the schema has no history, or the heads do not divide the width.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "head": ("head.hidden.*",),
            "ffn": ("*.ffn_in", "*.ffn_out"),
            "attention": ("*.attention.*",),
        }
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        position_dim: int | None = None,
        num_layers: int = 1,
        num_heads: int = 4,
        dropout: float | None = None,
        head_dropout: float = 0.0,
        residual: bool = True,
        layer_norm: bool = False,
        pooling: Literal["target", "mean"] = "target",
        head: Sequence[int] = (1024, 512, 256),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_histories("BST", widths)
        if num_layers < 1:
            raise ValueError(f"BST.num_layers must be at least 1, got {num_layers}.")
        position_dim = widths.embedding if position_dim is None else position_dim
        dropout = head_dropout if dropout is None else dropout
        self.pooling = pooling
        self._shares_histories = pooling == "target" and num_layers == 1
        self.positions = nn.ParameterList(
            nn.Parameter(torch.empty(history.max_length + 1, position_dim))
            for history in widths.histories
            if position_dim > 0
        )
        token_widths = [history.event + position_dim for history in widths.histories]
        self.transformers = nn.ModuleList(
            Transformer(
                TransformerLayer(
                    width,
                    num_heads,
                    dropout=dropout,
                    residual=residual,
                    layer_norm=layer_norm,
                    targets_only=pooling == "target" and layer == num_layers - 1,
                )
                for layer in range(num_layers)
            )
            for width in token_widths
        )
        # They say whose the tokens are that a transformer sees.
        self.rows = nn.ModuleList(HookPoint() for _ in token_widths)
        self.head = MLP(
            widths.candidate + widths.context + sum(token_widths),
            head,
            dropout=head_dropout,
            batch_norm=batch_norm,
        )
        self.reset_positions()

    @property
    def tokens(self) -> Mapping[str, str]:
        """See :class:`Backbone`; a layer for targets alone sees all tokens as keys and values."""
        found = {}
        for i, transformer in enumerate(self.transformers):
            for name, layer in transformer.named_modules():
                if isinstance(layer, TransformerLayer):
                    parts = ("attention.key", "attention.value") if layer.targets_only else ("*",)
                    found |= {f"transformers.{i}.{name}.{part}": f"rows.{i}" for part in parts}
        return found

    @property
    def shares_histories(self) -> bool:
        """See :class:`Backbone`; above a first layer events know of the target."""
        return self._shares_histories

    def reset_positions(self) -> None:
        """Start the learnable positions as sines and cosines of the distance to the target."""
        for position in self.positions:
            with torch.no_grad():
                position.copy_(_sinusoids(*position.shape))

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        sample_BS = self.sample_of(features)
        summaries = [
            self._summary_of_all(index, history)
            if history.shared
            else self._summary(index, tokens_of(history, features.max_seqlen))
            for index, history in enumerate(features.histories)
        ]
        return self.head(torch.cat([sample_BS, *summaries], dim=1))

    def _summary(self, index: int, tokens: Tokens) -> Tensor:
        x_NW = tokens.values
        if self.positions:
            x_NW = torch.cat([x_NW, F.embedding(tokens.recency, self.positions[index])], dim=1)
        offsets = self.rows[index](tokens.offsets)
        x_NW = self.transformers[index](x_NW, offsets, tokens.max_seqlen)
        if self.pooling == "target":
            return x_NW
        return torch.segment_reduce(x_NW, "mean", offsets=offsets, axis=0)

    def _summary_of_all(self, index: int, history: History) -> Tensor:
        """As `_summary`, where all rows have the same events."""
        target_BW, events_TW = history.target, history.events
        if self.positions:
            position = self.positions[index]
            own_BW = position[:1].expand(target_BW.shape[0], -1)
            recency_T = torch.arange(events_TW.shape[0], 0, -1, device=events_TW.device)
            target_BW = torch.cat([target_BW, own_BW], dim=1)
            events_TW = torch.cat([events_TW, F.embedding(recency_T, position)], dim=1)
        transformer = self.transformers[index]
        assert isinstance(transformer, Transformer)
        return transformer.of_all(target_BW, events_TW)


def _sinusoids(count: int, width: int) -> Tensor:
    """Vaswani et al., 2017, section 3.5, for distances 0 to ``count - 1``."""
    step_C1 = torch.arange(count, dtype=torch.float32).unsqueeze(1)
    even_W = torch.arange(0, width, 2, dtype=torch.float32)
    angle_CW = step_C1 * torch.exp(even_W * (-math.log(10_000.0) / width))
    table_CW = torch.zeros(count, width)
    table_CW[:, 0::2] = torch.sin(angle_CW)
    table_CW[:, 1::2] = torch.cos(angle_CW)[:, : width // 2]
    return table_CW
