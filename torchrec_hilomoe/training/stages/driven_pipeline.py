"""The pipeline of a host's loop, stage by stage: built anew, and fed with what is the stage's."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torchrec.distributed.train_pipeline import (
    TrainPipeline,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

__all__ = ["DrivenPipeline", "PipelineFactory"]

PipelineFactory = Callable[[Any, torch.optim.Optimizer], TrainPipeline[Any, Any]]


class DrivenPipeline:
    """Any of TorchRec's training pipelines, of the stage of the hour.

    Args:
        factory: Builds one of a model and an optimizer.

    Attributes:
        pipeline: Of this stage; None before its first step.
    """

    def __init__(self, factory: PipelineFactory) -> None:
        self.pipeline: TrainPipeline[Any, Any] | None = None
        self._factory = factory
        self._source: Iterator[Any] | None = None
        self._ahead: Iterator[Any] = iter(())
        self._sure = 0  # the step up to which batches may be read

    def drop(self) -> None:
        """Give the model its own forward back, for good: the next step builds another pipeline."""
        self.detach()
        self.pipeline = self._source = None

    def detach(self) -> None:
        """Give the model its own forward back, until :meth:`attach`."""
        if isinstance(self.pipeline, TrainPipelineSparseDist):
            self.pipeline.detach()

    def attach(self) -> None:
        """Take the model again. What was read ahead is distributed already, and stays so."""
        if isinstance(self.pipeline, TrainPipelineSparseDist):
            self.pipeline.attach(sparse_dist=False)

    def progress(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Any],
        *,
        step: int,
        sure_until: int,
    ) -> Any:
        """Train ``step``, and read no batch of ``sure_until`` or later."""
        if self.pipeline is None:
            self.pipeline = self._factory(model, optimizer)
        if batches is not self._source or step >= self._sure:
            self._source, self._sure = batches, sure_until
            self._ahead = islice(batches, sure_until - step)
            if isinstance(self.pipeline, TrainPipelineBase):
                self.pipeline.reset()  # it would remember that the iterator before has ended
        return self.pipeline.progress(self._ahead)
