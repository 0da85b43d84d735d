"""DLRM (Naumov et al., 2019, arXiv 1906.00091), of the parts of TorchRec's own.

It needs no history; the fields of one are pooled, as a bag of ids is.

Shape legend:
    B  rows
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor
from torchrec.models.dlrm import InteractionArch

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.layers.fields import FieldVectors
from torchrec_hilomoe.backbones.layers.mlp import Activation, MLP
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["DLRM"]


class DLRM(Backbone):
    """The dot products of all pairs of fields, beside the vector of the numbers; then an MLP head.

    With the usual options it computes what ``torchrec.models.dlrm.DLRM`` does.

    Args:
        widths: Sizes of the features.
        dense_units: Hidden widths of the map of the dense features.
        head: Hidden widths of the head.
        head_activation: Activation of those units.
        head_dropout: Share of those units dropped in training.
        batch_norm: Whether the head's hidden layers are normalised.

    Raises:
        ValueError: If an option is impossible.
    """

    SITES: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"head": ("head.hidden.*",), "dense": ("fields.dense.*",)}
    )

    def __init__(
        self,
        widths: FeatureWidths,
        *,
        dense_units: Sequence[int] = (512, 256),
        head: Sequence[int] = (1024, 512, 256),
        head_activation: Activation = "relu",
        head_dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.fields = FieldVectors("dlrm", widths, dense_units)
        others = self.fields.num_fields
        self.interaction = InteractionArch(others)
        self.head = MLP(
            widths.embedding + others * (others + 1) // 2,
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
        return self.head(self.interaction(first_BD, rest_BFD))
