"""DIEN, the Deep Interest Evolution Network (Zhou et al., 2019, arXiv 1809.03672).

The definition follows BARS's tuned runs of it: one pair of recurrences for each sequence group,
over its fields side by side, and no auxiliary loss, which works here all the same.

Shape legend:
    B  rows
    W  width of an event and of a state
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.base import Backbone, check_histories, HookPoint
from torchrec_hilomoe.backbones.layers.gru import GRU
from torchrec_hilomoe.backbones.layers.jagged import Layout, layout_of
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP
from torchrec_hilomoe.backbones.layers.next_event import NextEventLoss
from torchrec_hilomoe.backbones.layers.target_attention import ProductAttention, TargetAttention
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures

__all__ = ["DIEN", "Attention", "Interest"]

Attention = Literal["mlp", "bilinear", "dot"]


class Interest(nn.Module):
    """What a history has come to, as far as the target asks: GRU, attention, AUGRU.

    Args:
        width: ``W``.
        attention: What weighs the extraction's states by the target.
        auxiliary: What else those states should tell; None if nothing.
    """

    def __init__(
        self,
        width: int,
        attention: TargetAttention | ProductAttention,
        auxiliary: NextEventLoss | None,
    ) -> None:
        super().__init__()
        self.extraction = GRU(width)
        self.attention = attention
        self.evolution = GRU(width)
        self.auxiliary = auxiliary

    def forward(self, history: History, layout: Layout) -> Tensor:
        """Return ``(B, W)``; zero for a row without events."""
        states_TW = self.extraction(history.events, layout.offsets).every
        attention_T = self.attention.weights(history.target, states_TW, layout)
        last_BW = self.evolution(states_TW, layout.offsets, attention_T).last
        if self.auxiliary is None:
            return last_BW
        return self.auxiliary(last_BW, states_TW, history.events, layout)


class DIEN(Backbone):
    """How each history has evolved towards the target, beside all else; then an MLP head.

    Args:
        widths: Sizes of the features.
        attention: ``"mlp"`` compares states with the target as DIN does, ``"bilinear"`` by a
            learned product, ``"dot"`` by the plain one.
        attention_units: Hidden widths of each attention's MLP; nothing to the other two.
        attention_activation: Activation of those units.
        attention_dropout: Share of those units dropped in training.
        auxiliary_weight: Of the loss that each state knows the event after it; the model's is the
            mean over sequence groups. 0 leaves it, and its parameters, out.
        auxiliary_units: Hidden widths of that loss's MLP.
        head: Hidden widths of the head.
        head_activation: Activation of those units.
        head_dropout: Share of those units dropped in training.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If the schema has no history, or an option is impossible.
    """

    # The states' own part of a recurrence is no linear map that one could replace; see GRU.
    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "head": ("head.hidden.*",),
            "attention": ("interests.*.attention.*hidden*",),
            "gru": ("interests.*.extraction.input", "interests.*.evolution.input"),
        }
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        attention: Attention = "mlp",
        attention_units: Sequence[int] = (80, 40),
        attention_activation: Activation = "dice",
        attention_dropout: float = 0.0,
        auxiliary_weight: float = 0.0,
        auxiliary_units: Sequence[int] = (100, 50),
        head: Sequence[int] = (1024, 512, 256),
        head_activation: Activation = "relu",
        head_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _check(widths, attention, attention_units, auxiliary_weight, auxiliary_units)

        def attention_of(width: int) -> TargetAttention | ProductAttention:
            if attention == "mlp":
                return TargetAttention(
                    width,
                    attention_units,
                    activation=attention_activation,
                    dropout=attention_dropout,
                )
            return ProductAttention(width, learned=attention == "bilinear")

        def auxiliary_of(width: int) -> NextEventLoss | None:
            if auxiliary_weight == 0:
                return None
            weight = auxiliary_weight / len(widths.histories)
            return NextEventLoss(width, weight, hidden=auxiliary_units)

        events = [history.event for history in widths.histories]
        self.interests = nn.ModuleList(
            Interest(width, attention_of(width), auxiliary_of(width)) for width in events
        )
        # They say whose the events are that an interest sees.
        self.rows = nn.ModuleList(HookPoint() for _ in events)
        self.head = MLP(
            widths.candidate + widths.context + sum(events),
            head,
            activation=head_activation,
            dropout=head_dropout,
            batch_norm=batch_norm,
        )

    @property
    def tokens(self) -> Mapping[str, str]:
        """See :class:`Backbone`."""
        return {f"interests.{i}.*": f"rows.{i}" for i in range(len(self.rows))}

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        sample_BS = self.sample_of(features)
        evolved = []
        for index, interest in enumerate(self.interests):
            history = features.histories[index]
            layout = layout_of(history)
            layout = Layout(offsets=self.rows[index](layout.offsets), row=layout.row)
            evolved.append(interest(history, layout))
        return self.head(torch.cat([sample_BS, *evolved], dim=1))


def _check(
    widths: FeatureWidths,
    attention: str,
    attention_units: Sequence[int],
    auxiliary_weight: float,
    auxiliary_units: Sequence[int],
) -> None:
    check_histories("DIEN", widths)
    if attention not in ("mlp", "bilinear", "dot"):
        raise ValueError(
            f"DIEN.attention is {attention!r}, which is not known. Use mlp, bilinear or dot in "
            "model.dien.attention."
        )
    if not 0 <= auxiliary_weight < float("inf"):
        raise ValueError(
            f"DIEN.auxiliary_weight must be 0 or more, got {auxiliary_weight}. Correct "
            "model.dien.auxiliary_weight; 0 leaves the loss out."
        )
    for name, units in (("attention_units", attention_units), ("auxiliary_units", auxiliary_units)):
        if not units or min(units) < 1:
            raise ValueError(
                f"DIEN.{name} must be widths of at least 1, and one of them at least, got "
                f"{tuple(units)}. Correct model.dien.{name}."
            )
