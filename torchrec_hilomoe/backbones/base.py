"""The one interface of every backbone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.jagged import mean_rows
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["Backbone", "HookPoint", "check_histories"]


class HookPoint(nn.Module):
    """Passes its input on: a named place in a model where hooks hear a tensor pass.

    Unlike those of ``nn.Identity``, its hooks run while FX traces, too: the tracer does not enter
    the modules of ``torch.nn``, nor run their hooks.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class Backbone(nn.Module, ABC):
    """Sequence features in, one logit a row out.

    Attributes:
        SITES: Groups of linear maps that are sensible places for experts: group name to name
            patterns inside the backbone, in the order of :func:`fnmatch.fnmatch`.
        sample: Passes on what is known of each row before its histories are attended, so that a
            router that decides once per row can hear it: candidate and context.
        include_history_mean: Whether the mean event of each history follows these.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def __init__(self) -> None:
        super().__init__()
        self.sample = HookPoint()
        self.include_history_mean = False

    @property
    def shares_histories(self) -> bool:
        """Whether it takes histories that all rows share, and computes once what it can of them.

        A map that ``tokens`` names must not need to know then whose its events are.
        """
        return False

    @property
    def tokens(self) -> Mapping[str, str]:
        """Modules that say whose the events are that a map sees in one jagged list.

        Name pattern of such maps to the module inside the backbone whose output, ``(B + 1,)``, is
        where each row's events begin.
        """
        return MappingProxyType({})

    def sample_of(self, features: SequenceFeatures) -> Tensor:
        """Join candidate and context, ``(B, C + P)``; a backbone calls it before its sites run."""
        sample_BS = features.sample
        means = [mean_rows(history) for history in features.histories if self.include_history_mean]
        self.sample(torch.cat([sample_BS, *means], dim=1) if means else sample_BS)
        return sample_BS

    @abstractmethod
    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""


def check_histories(backbone: str, widths: FeatureWidths) -> None:
    """Refuse a schema without a history for a model of histories.

    Raises:
        ValueError: If there is none.
    """
    if not widths.histories:
        raise ValueError(
            f"{backbone} needs a behaviour sequence, but the schema has none. Add one to "
            "Schema.sequences, or take model.backbone dlrm or dcn, which need none."
        )
