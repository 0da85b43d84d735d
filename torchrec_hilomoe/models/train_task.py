"""The ranker, and what TorchRec's pipeline drives: a batch in, the loss and inputs of metrics out.

Shape legend:
    B  rows
"""

from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.embeddings.features import ModelInputs
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch

__all__ = ["CTRModel", "TaskOutput", "TrainTask"]


class CTRModel(nn.Module):
    """Lookups, then a backbone.

    Args:
        sparse: The two sharded collections.
        backbone: One of :data:`torchrec_hilomoe.models.build.BACKBONES`.
    """

    def __init__(self, sparse: SparseArch, backbone: Backbone) -> None:
        super().__init__()
        self.sparse = sparse
        self.backbone = backbone

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Return logits ``(B,)``."""
        return self.backbone(self.sparse(inputs))


@dataclass(frozen=True)
class TaskOutput:
    """A batch's results; no tensor carries a gradient.

    Attributes:
        loss: ``()``, this rank's term of the global mean.
        logits: ``(B,)``.
        labels: ``(B,)``.
        weights: ``(B,)``.
        grouping_keys: ``(B,)``.
        loss_denominator: Rows of the global batch divided by the world size.
        position: Position in the training data after this batch.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor
    grouping_keys: Tensor
    loss_denominator: float
    position: LoaderState


class TrainTask(nn.Module):
    """Binary cross-entropy over the global batch, of clicks and of a teacher's predictions.

    The sum over a rank's rows is divided by the mean number of rows a rank has, not by its own:
    then the average over ranks, which is what data parallelism takes, is the mean over the
    global batch however unevenly the rows are spread.

    Of a batch with ``teacher_logits`` t, a row's loss is ``(1 - w) BCE(z, y) + w T^2 BCE(z / T,
    sigmoid(t / T))`` (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015).

    Args:
        model: The ranker.

    Attributes:
        device_type: Device type on which autocast acts.
        dtype: Type that the ranker computes in; None is that of its parameters.
        loss_scale: Factor on the loss for ``backward``; the output has it unscaled.
        teacher_weight: Share w of the teacher's term in the loss, 0 to 1.
        teacher_temperature: Divisor T of both logits in that term.
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model
        self.device_type = "cpu"
        self.dtype: torch.dtype | None = None
        self.loss_scale = 1.0
        self.teacher_weight = 0.0
        self.teacher_temperature = 1.0

    def forward(self, batch: CTRBatch) -> tuple[Tensor, TaskOutput]:
        """Return the loss ``()`` and the :class:`TaskOutput`."""
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            logits_B = self.model(ModelInputs.of(batch)).float()
        losses_B = F.binary_cross_entropy_with_logits(logits_B, batch.labels, reduction="none")
        if self.teacher_weight and batch.teacher_logits is not None:
            losses_B = self._taught(losses_B, logits_B, batch.teacher_logits)
        loss = (losses_B * batch.weights).sum() / batch.loss_denominator
        return loss * self.loss_scale, TaskOutput(
            loss=loss.detach(),
            logits=logits_B.detach(),
            labels=batch.labels,
            weights=batch.weights,
            grouping_keys=batch.grouping_keys,
            loss_denominator=batch.loss_denominator,
            position=batch.position,
        )

    def _taught(self, losses_B: Tensor, logits_B: Tensor, teacher_logits_B: Tensor) -> Tensor:
        weight, temperature = self.teacher_weight, self.teacher_temperature
        soft_B = F.binary_cross_entropy_with_logits(
            logits_B / temperature, torch.sigmoid(teacher_logits_B / temperature), reduction="none"
        )
        return (1 - weight) * losses_B + weight * temperature**2 * soft_B
