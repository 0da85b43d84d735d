"""The one interface of every backbone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import nn, Tensor

from torchrec_hilomoe.embeddings.features import SequenceFeatures

__all__ = ["Backbone"]


class Backbone(nn.Module, ABC):
    """Sequence features in, one logit a row out.

    Attributes:
        SITES: Groups of linear maps that are sensible places for experts: group name to name
            patterns inside the backbone, in the order of :func:`fnmatch.fnmatch`.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    @abstractmethod
    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
