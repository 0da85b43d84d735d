"""Metrics by slice: of the rows that have the same value of a feature."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.metrics import SlicedPredictions

__all__ = ["Slicer"]


class Slicer:
    """Remembers a feature of the batches that go in, until their outputs come.

    Args:
        schema: Of the batches.
        feature: A column of one id a row: of the candidate, the context, or the group.

    Raises:
        ValueError: If there is no such column.

    Attributes:
        predictions: By value of the feature.
    """

    def __init__(self, schema: Schema, feature: str) -> None:
        single = {field.name for field in schema.candidate} | {schema.group}
        single |= {field.name for field in schema.pooled if field.max_length == 1}
        if feature not in single:
            raise ValueError(
                f"slice is {feature!r}, but a slice needs a column of one id a row; here these "
                f"are {', '.join(sorted(single))}."
            )
        self.predictions = SlicedPredictions(feature)
        self._feature = feature
        self._schema = schema
        self._waiting: deque[Tensor] = deque()

    def watch(self, batches: Iterable[CTRBatch]) -> Iterator[CTRBatch]:
        """Pass batches on."""
        for batch in batches:
            self._waiting.append(self._values(batch))
            yield batch

    def take(self, output: TaskOutput) -> None:
        """Take the output of the oldest batch that has none yet."""
        values_B = self._waiting.popleft().to(output.logits.device)
        self.predictions.add(output.logits, output.labels, values_B, output.weights)

    def _values(self, batch: CTRBatch) -> Tensor:
        if self._feature in batch.unpooled.keys():  # noqa: SIM118  # not a dict
            return batch.unpooled[self._feature].values()
        if self._feature not in batch.pooled.keys():  # noqa: SIM118
            return batch.groups
        ids = batch.pooled[self._feature]
        values_B = torch.zeros_like(batch.groups)
        has_id_B = ids.lengths()[: len(values_B)] > 0  # a row without one has the unknown one
        values_B[has_id_B] = ids.values().long()
        return values_B
