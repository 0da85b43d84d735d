"""What the TorchRec pipeline drives: a batch in, the loss and what metrics need out.

Shape legend:
    B  rows
"""

from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.models.ctr_model import CTRModel

__all__ = ["TaskOutput", "TrainTask"]


@dataclass(frozen=True)
class TaskOutput:
    """A batch's results; no tensor carries a gradient.

    Attributes:
        loss: ``()``, this rank's term of the global mean.
        logits: ``(B,)``.
        labels: ``(B,)``.
        weights: ``(B,)``.
        groups: ``(B,)``.
        mean_rows: Rows of the global batch divided by the world size.
        position: Where training resumes after this batch.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor
    groups: Tensor
    mean_rows: float
    position: Position


class TrainTask(nn.Module):
    """Binary cross-entropy over the global batch.

    The sum over a rank's rows is divided by the mean number of rows a rank has, not by its own:
    then the average over ranks, which is what data parallelism takes, is the mean over the
    global batch however unevenly the rows are spread.

    Args:
        model: The ranker.

    Attributes:
        device_type: Where autocast acts.
        dtype: What the ranker computes in; None is that of its parameters.
        loss_scale: What the loss is multiplied by for ``backward``; the output has it unscaled.
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model
        self.device_type = "cpu"
        self.dtype: torch.dtype | None = None
        self.loss_scale = 1.0

    def forward(self, batch: CTRBatch) -> tuple[Tensor, TaskOutput]:
        """Return the loss ``()`` and the :class:`TaskOutput`."""
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            logits_B = self.model(
                batch.pooled,
                batch.unpooled,
                batch.dense,
                batch.longest,
                time_B=batch.time,
                times=batch.times,
                steps=batch.steps,
                rows=batch.labels.shape[0],
            ).float()
        losses_B = F.binary_cross_entropy_with_logits(logits_B, batch.labels, reduction="none")
        loss = (losses_B * batch.weights).sum() / batch.mean_rows
        return loss * self.loss_scale, TaskOutput(
            loss=loss.detach(),
            logits=logits_B.detach(),
            labels=batch.labels,
            weights=batch.weights,
            groups=batch.groups,
            mean_rows=batch.mean_rows,
            position=batch.position,
        )
