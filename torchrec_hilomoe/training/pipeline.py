"""TorchRec's pipelines, driven as plain iterators."""

from collections.abc import Iterator

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.train_task import TaskOutput

__all__ = ["Pipeline", "predict"]


class Pipeline:
    """Trains batch after batch while the next ones are copied and distributed.

    Args:
        model: The sharded model, wrapped for the stage that it trains.
        optimizer: All optimizers in one.
        device: Where this rank computes.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        device: torch.device,
    ) -> None:
        self._pipeline: TrainPipelineSparseDist[CTRBatch, TaskOutput] = TrainPipelineSparseDist(
            model, optimizer, device, execute_all_batches=True
        )
        self._detached = False

    def step(self, batches: Iterator[CTRBatch]) -> TaskOutput:
        """Train one step; reads ahead, but trains every batch that it has read.

        Raises:
            StopIteration: When ``batches`` has ended and all of them are trained.
        """
        if self._detached:
            # Batches that were read ahead are distributed already. Left to itself, the pipeline
            # would distribute one of them again, and the ranks' exchanges would not match.
            self._pipeline.attach(sparse_dist=False)
            self._detached = False
        return self._pipeline.progress(batches)

    def detach(self) -> None:
        """Give the model its own forward back; the next :meth:`step` takes it again."""
        self._pipeline.detach()
        self._detached = True


def predict(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    batches: Iterator[CTRBatch],
) -> Iterator[TaskOutput]:
    """Yield the outputs of ``batches`` in evaluation mode.

    Args:
        model: The sharded model, detached from a training pipeline.
        optimizer: Unused, but TorchRec's pipeline wants one.
        batches: As many on every rank.
    """
    model.eval()
    pipeline: EvalPipelineSparseDist[CTRBatch, TaskOutput] = EvalPipelineSparseDist(
        model, optimizer, model.device
    )
    try:
        while True:
            try:
                yield pipeline.progress(batches)
            except StopIteration:
                return
    finally:
        pipeline.detach()
