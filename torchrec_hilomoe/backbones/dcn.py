"""DCN-v2 (Wang et al., 2021, arXiv 2008.13535), stacked as in TorchRec's ``DLRM_DCN``.

It needs no history; the fields of one are pooled, as a bag of ids is.

Shape legend:
    B  rows
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.layers.cross import CrossNetwork
from torchrec_hilomoe.backbones.layers.fields import FieldVectors
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["DCN"]


class DCN(Backbone):
    """Explicit crosses of the vectors of all fields, side by side; then an MLP head.

    With a low rank and the usual options it computes what ``torchrec.models.dlrm.DLRM_DCN`` does.

    Args:
        widths: Sizes of the features.
        dense_units: Hidden widths of the map of the dense features.
        cross_layers: Layers of the cross network; at least 1.
        low_rank: Rank of a cross layer's matrix; None for a full one.
        head: Hidden widths of the head.
        head_activation: Activation of those units.
        head_dropout: Share of those units dropped in training.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If an option is impossible.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"head": ("head.hidden.*",), "cross": ("cross.*",), "dense": ("fields.dense.*",)}
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        dense_units: Sequence[int] = (512, 256),
        cross_layers: int = 3,
        low_rank: int | None = None,
        head: Sequence[int] = (1024, 512, 256),
        head_activation: Activation = "relu",
        head_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.fields = FieldVectors("dcn", widths, dense_units)
        width = (1 + self.fields.num_fields) * widths.embedding
        self.cross = CrossNetwork(width, cross_layers, low_rank=low_rank)
        self.head = MLP(
            width,
            head,
            activation=head_activation,
            dropout=head_dropout,
            batch_norm=batch_norm,
        )

    @property
    def shares_histories(self) -> bool:
        """See :class:`Backbone`; it takes their means."""
        return True

    def forward(self, features: SequenceFeatures) -> Tensor:
        """Return logits ``(B,)``."""
        self.sample_of(features)
        first_BD, rest_BFD = self.fields(features)
        return self.head(self.cross(torch.cat([first_BD, rest_BFD.flatten(1)], dim=1)))
