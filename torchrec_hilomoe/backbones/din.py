"""DIN, the Deep Interest Network (Zhou et al., 2018, arXiv 1706.06978).

The definition follows BARS's tuned runs of it: one attention for each sequence group, over its
fields side by side.

Shape legend:
    B  rows
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.base import Backbone, check_histories, HookPoint
from torchrec_hilomoe.backbones.layers.jagged import Layout, layout_of
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP
from torchrec_hilomoe.backbones.layers.target_attention import TargetAttention
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["DIN"]


class DIN(Backbone):
    """Each history, weighted by how it compares to the target, beside all else; then an MLP head.

    Args:
        widths: Sizes of the features.
        attention_units: Hidden widths of each attention's MLP.
        attention_activation: Activation of those units.
        attention_dropout: Share of those units dropped in training.
        softmax: Whether the weights of a history sum to one; without, they may be negative.
        head: Hidden widths of the head.
        head_activation: Activation of those units.
        head_dropout: Share of those units dropped in training.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If the schema has no history, or an option is impossible.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"head": ("head.hidden.*",), "attention": ("attentions.*.mlp.hidden.*",)}
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        attention_units: Sequence[int] = (64,),
        attention_activation: Activation = "dice",
        attention_dropout: float = 0.0,
        softmax: bool = False,
        head: Sequence[int] = (1024, 512, 256),
        head_activation: Activation = "relu",
        head_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_histories("DIN", widths)
        if not attention_units or min(attention_units) < 1:
            raise ValueError(
                "DIN.attention_units must be widths of at least 1, and one of them at least, got "
                f"{tuple(attention_units)}. Correct model.din.attention_units."
            )
        self.attentions = nn.ModuleList(
            TargetAttention(
                history.event,
                attention_units,
                activation=attention_activation,
                dropout=attention_dropout,
                softmax=softmax,
            )
            for history in widths.histories
        )
        # They say whose the events are that an attention sees.
        self.rows = nn.ModuleList(HookPoint() for _ in widths.histories)
        self.head = MLP(
            widths.candidate + widths.context + sum(history.event for history in widths.histories),
            head,
            activation=head_activation,
            dropout=head_dropout,
            batch_norm=batch_norm,
        )

    @property
    def tokens(self) -> Mapping[str, str]:
        """See :class:`Backbone`."""
        return {f"attentions.{i}.*": f"rows.{i}" for i in range(len(self.rows))}

    @property
    def shares_histories(self) -> bool:
        """See :class:`Backbone`."""
        return True

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        sample_BS = self.sample_of(features)
        pooled = []
        for index, history in enumerate(features.histories):
            if history.shared:
                attention = self.attentions[index]
                assert isinstance(attention, TargetAttention)
                pooled.append(attention.of_all(history.target, history.events))
                continue
            layout = layout_of(history)
            layout = Layout(offsets=self.rows[index](layout.offsets), row=layout.row)
            pooled.append(self.attentions[index](history.target, history.events, layout))
        return self.head(torch.cat([sample_BS, *pooled], dim=1))
