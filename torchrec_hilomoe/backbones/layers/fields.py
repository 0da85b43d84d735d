"""The vectors of a sample's fields, as TorchRec's DLRM makes them: the numbers are one of them.

Shape legend:
    B  rows
    F  fields whose values are ids
    D  embedding width
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor
from torchrec.models.dlrm import DenseArch

from torchrec_hilomoe.backbones.layers.jagged import mean_rows
from torchrec_hilomoe.embeddings.features import FeatureWidths, SequenceFeatures

__all__ = ["FieldVectors"]


class FieldVectors(nn.Module):
    """TorchRec's ``DenseArch`` on the dense features, beside an embedding a field.

    Fields are the candidate's, the pooled ones, and those of histories, each by the mean of its
    events, as a pooled embedding bag of the same ids. Without dense features, the first of them
    stands in the place of theirs.

    Args:
        backbone: Of whom an error speaks, by the name of its options.
        widths: Sizes of the features.
        dense_units: Hidden widths of the map of the dense features; ``D`` follows.

    Attributes:
        num_fields: ``F``, without the one that stands first.

    Raises:
        ValueError: If a layer would have no unit.
    """

    def __init__(self, backbone: str, widths: FeatureWidths, dense_units: Sequence[int]) -> None:
        super().__init__()
        if any(units < 1 for units in dense_units):
            raise ValueError(
                f"model.{backbone}.dense_units must be widths of at least 1, got "
                f"{tuple(dense_units)}. Correct them, or leave none for a single layer."
            )
        self._embedding, self._dense = widths.embedding, widths.dense
        self.dense: DenseArch | None = None
        if widths.dense:
            self.dense = DenseArch(widths.dense, [*dense_units, widths.embedding])
        events = sum(history.event for history in widths.histories)
        ids = widths.candidate + widths.context - widths.dense + events
        self.num_fields = ids // widths.embedding - (0 if widths.dense else 1)

    def forward(self, features: SequenceFeatures) -> tuple[Tensor, Tensor]:
        """Return the first vector ``(B, D)``, and those of the other fields ``(B, F, D)``."""
        first_BD, rest = None, features.sample
        if self.dense is not None:
            first_BD, rest = self.dense(rest[:, -self._dense :]), rest[:, : -self._dense]
        if means := [mean_rows(history) for history in features.histories]:
            rest = torch.cat([rest, *means], dim=1)
        if first_BD is None:
            first_BD, rest = rest[:, : self._embedding], rest[:, self._embedding :]
        return first_BD, rest.unflatten(1, (self.num_fields, self._embedding))
