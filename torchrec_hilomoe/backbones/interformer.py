"""InterFormer (Zeng et al., 2024, arXiv 2411.09852 v4): context and history learn from each other.

Two sides keep all their tokens through all layers, the context's and the history's. In each layer
both are summarised, and each side reads the other's summary of the same layer, so they run in
parallel.

Where the paper is silent:

- Its MLPs have one hidden layer, as wide as their output, with Swish.
- The history's side has no residuals, because none are printed; ``residual`` adds them.
- The model ends with summaries of the last layer's outputs, or nobody would read that layer.
- A token's rotary position is its index in its row with the CLS tokens, because they are prepended.
- The latest events are those of the history, never a CLS token; a missing one is zero.
- Sequences of different lengths are merged from the latest event on; see ``layers/masknet.py``.

Shape legend:
    B  rows
    N  tokens of all rows together: of each row its CLS tokens, then its events, oldest first
    T  events of all rows together, merged over the sequence groups
    X  tokens of the context: candidate and context fields, and one for all dense features
    C  tokens of the context's summary, which are also the CLS tokens
    S  tokens of the history's summary: CLS, pooled, recent
    F  width of candidate and context together
    D  width of every token: one embedding
    L  the longest row of the batch
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.base import Backbone, check_histories, HookPoint
from torchrec_hilomoe.backbones.layers.attention import SelfAttention
from torchrec_hilomoe.backbones.layers.cls_tokens import Places, places_of, prepend, TokenCounts
from torchrec_hilomoe.backbones.layers.dhen import Interaction
from torchrec_hilomoe.backbones.layers.gating import Gating
from torchrec_hilomoe.backbones.layers.jagged import offsets_of, pad, unpad
from torchrec_hilomoe.backbones.layers.masknet import MaskNet, steps_of
from torchrec_hilomoe.backbones.layers.mlp import MLP
from torchrec_hilomoe.backbones.layers.summaries import ContextSummary, HistorySummary
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["HistoryLayer", "InterFormer", "PersonalisedFFN"]


class InterFormer(Backbone):
    """Layers in which context and history read each other's summaries; then an MLP of both.

    The candidate is part of the context.

    Args:
        widths: Sizes of the features.
        num_layers: At least 1.
        interaction_layers: Of DHEN, in each layer; at least 1.
        num_heads: Attention heads; each gets an even number of an embedding's features.
        cls_tokens: Tokens of the context's summary, prepended to the history; at least 1.
        pooled_tokens: Of the history's summary, by attention pooling.
        recent_tokens: Of the history's summary, the latest events.
        gating: Of the summaries: see :class:`torchrec_hilomoe.backbones.layers.gating.Gate`.
        residual: Whether the history's side adds to its inputs.
        dropout: Inside the layers; None is ``head_dropout``.
        head_dropout: Inside the head.
        head: Hidden widths of the head.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If the schema has no history, a count is too small, the gating is not known, or
            the heads do not divide an embedding into even parts.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "head": ("head.hidden.*",),
            "interaction": ("interactions.*",),
            "ffn": ("histories.*.ffn.*",),
            "attention": ("histories.*.attention.*", "history_summaries.*.pool.*"),
            "summary": ("context_summaries.*", "history_summaries.*.gate.*"),
            "merge": ("merge.*",),
        }
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        num_layers: int = 2,
        interaction_layers: int = 1,
        num_heads: int = 1,
        cls_tokens: int = 4,
        pooled_tokens: int = 2,
        recent_tokens: int = 2,
        gating: Gating = "printed",
        residual: bool = False,
        dropout: float | None = None,
        head_dropout: float = 0.0,
        head: Sequence[int] = (1024, 512, 256, 128),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_histories("InterFormer", widths)
        _check_heads(num_heads, widths.embedding)
        _check_at_least(1, num_layers=num_layers, interaction_layers=interaction_layers)
        _check_at_least(1, cls_tokens=cls_tokens)
        _check_at_least(0, pooled_tokens=pooled_tokens, recent_tokens=recent_tokens)
        dropout = head_dropout if dropout is None else dropout
        self.width = width = widths.embedding
        self.head_width = width // num_heads
        self.num_dense = widths.dense
        fields = widths.candidate + widths.context - widths.dense
        self.counts = TokenCounts(
            context=fields // width + (widths.dense > 0),
            cls=cls_tokens,
            pooled=pooled_tokens,
            recent=recent_tokens,
        )
        self.dense = nn.Linear(widths.dense, width) if widths.dense else nn.Identity()
        self.merge = MaskNet(sum(history.event for history in widths.histories), width)
        # They say whose the events are that a map sees in one list, without and with CLS tokens.
        self.event_rows, self.token_rows = HookPoint(), HookPoint()
        self.context_summaries = nn.ModuleList(
            ContextSummary(self.counts, width, gating) for _ in range(num_layers + 1)
        )
        self.history_summaries = nn.ModuleList(
            HistorySummary(self.counts, width, num_heads=num_heads, gating=gating, dropout=dropout)
            for _ in range(num_layers + 1)
        )
        self.interactions = nn.ModuleList(
            Interaction(
                self.counts.context,
                self.counts.summary,
                width,
                num_layers=interaction_layers,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.histories = nn.ModuleList(
            HistoryLayer(width, cls_tokens, num_heads=num_heads, residual=residual, dropout=dropout)
            for _ in range(num_layers)
        )
        self.head = MLP(
            (self.counts.cls + self.counts.summary) * width,
            head,
            activation="silu",
            dropout=head_dropout,
            batch_norm=batch_norm,
        )

    @property
    def tokens(self) -> Mapping[str, str]:
        """See :class:`Backbone`."""
        return {
            "merge.*": "event_rows",
            "histories.*": "token_rows",
            "history_summaries.*.pool.key": "token_rows",
            "history_summaries.*.pool.value": "token_rows",
        }

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        x_BXD = self._context(self.sample_of(features))
        steps = steps_of(features.histories, features.num_tokens)
        self.event_rows(offsets_of(steps.lengths))
        offsets = self.token_rows(offsets_of(steps.lengths + self.counts.cls))
        events_TD = self.merge(steps.values)
        places = places_of(offsets, events_TD, features.max_seqlen, self.counts, self.head_width)
        context_BCD = self.context_summaries[0](x_BXD)
        history_ND = prepend(context_BCD, events_TD, places)
        summary_BSD = self.history_summaries[0](history_ND, places)
        for layer in range(len(self.interactions)):
            x_BXD = self.interactions[layer](x_BXD, summary_BSD)
            history_ND = self.histories[layer](history_ND, context_BCD, places)
            context_BCD = self.context_summaries[layer + 1](x_BXD)
            summary_BSD = self.history_summaries[layer + 1](history_ND, places)
        return self.head(torch.cat([context_BCD, summary_BSD], dim=1).flatten(1))

    def _context(self, sample_BF: Tensor) -> Tensor:
        """Split candidate and context into tokens; dense features become the last one."""
        fields = self.counts.context - (self.num_dense > 0)
        tokens_BXD = sample_BF[:, : fields * self.width].unflatten(1, (fields, self.width))
        if not self.num_dense:
            return tokens_BXD
        dense_B1D = self.dense(sample_BF[:, -self.num_dense :]).unsqueeze(1)
        return torch.cat([tokens_BXD, dense_B1D], dim=1)


def _check_heads(num_heads: int, embedding: int) -> None:
    if num_heads < 1 or embedding % (2 * num_heads):
        raise ValueError(
            "InterFormer.num_heads must be at least 1 and divide the embedding's width into even "
            "parts, because rotary positions turn pairs of features; got "
            f"num_heads={num_heads} and width={embedding}. Change the heads or model.embedding_dim."
        )


def _check_at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"InterFormer.{name} must be at least {least}, got {count}.")


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
        weights_BLC = pad(self.weigh(x_ND), places.offsets, places.max_seqlen)
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
        attended_ND = self.attention(
            x_ND, places.offsets, places.max_seqlen, rotation=places.rotation
        )
        attended_ND = self.dropout(attended_ND)
        return x_ND + attended_ND if self.residual else attended_ND
