"""TorchRec's pipelines, driven as plain iterators."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import get_args, Literal

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
    PrefetchTrainPipelineSparseDist,
    TrainPipeline,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSemiSync
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import SequenceGroup
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.pipelines.buckets import settle_buckets
from torchrec_hilomoe.training.pipelines.microbatches import cut_all

__all__ = ["Pipeline", "PipelineKind", "PipelineOptions", "predict"]

PipelineKind = Literal["base", "sparse_dist", "prefetch", "semi_sync"]

OVERLAPPING: dict[PipelineKind, type[TrainPipelineSparseDist]] = {
    "sparse_dist": TrainPipelineSparseDist,
    "prefetch": PrefetchTrainPipelineSparseDist,
    "semi_sync": TrainPipelineSemiSync,
}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How steps are driven.

    Attributes:
        kind: How they overlap.
        debug: Whether they do not: one after the other, without a pipeline.
        accumulate: Micro-batches of a step.
        sequences: As :func:`torchrec_hilomoe.training.pipelines.microbatches.cut` wants them.
    """

    kind: PipelineKind = "sparse_dist"
    debug: bool = False
    accumulate: int = 1
    sequences: tuple[SequenceGroup, ...] = ()

    def __post_init__(self) -> None:
        assert self.kind in get_args(PipelineKind)
        assert self.accumulate >= 1


class Pipeline:
    """Trains batch after batch while the next ones are copied and distributed.

    Args:
        model: The sharded model, wrapped for the stage that it trains.
        optimizer: All optimizers in one.
        device: Where this rank computes.
        options: How steps are driven.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        device: torch.device,
        options: PipelineOptions | None = None,
    ) -> None:
        self._options = options = options or PipelineOptions()
        self._pipeline = _pipeline(model, optimizer, device, options)
        self._driven = self._pipeline
        if options.accumulate > 1:
            config = GradientAccumulationConfig(is_enabled=True, num_steps=options.accumulate)
            wrapper = GradientAccumulationWrapper(self._pipeline, optimizer, model, config)
            # Its first step would average gradients early, for DDP's static graph, which is off
            # here. A run that is resumed would then differ from one that was not by a rounding.
            wrapper.set_step(options.accumulate)
            self._driven = wrapper
        self._model = model
        self._settled = False
        self._detached = False
        self._source: Iterator[CTRBatch] | None = None
        self._pieces: Iterator[CTRBatch] = iter(())

    def step(self, batches: Iterator[CTRBatch]) -> TaskOutput:
        """Train one step; reads ahead, but trains every batch that it has read.

        Another iterator may be given once the one before has ended and all of it is trained.

        Raises:
            StopIteration: When ``batches`` has ended and all of them are trained.
        """
        if self._detached and isinstance(self._pipeline, TrainPipelineSparseDist):
            # Batches that were read ahead are distributed already. Left to itself, the pipeline
            # would distribute one of them again, and the ranks' exchanges would not match.
            self._pipeline.attach(sparse_dist=False)
        self._detached = False
        if batches is not self._source:
            self._take(batches)
        outputs = [self._driven.progress(self._pieces) for _ in range(self._options.accumulate)]
        return _joined(outputs)

    def detach(self) -> None:
        """Give the model its own forward back; the next :meth:`step` takes it again."""
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()
        self._detached = True

    def _take(self, batches: Iterator[CTRBatch]) -> None:
        options = self._options
        self._source = self._pieces = batches
        if options.accumulate > 1:
            self._pieces = cut_all(batches, options.accumulate, options.sequences)
        if not self._settled:
            first = next(self._pieces)
            settle_buckets(self._model, first)
            self._pieces = chain([first], self._pieces)
            self._settled = True
        if isinstance(self._pipeline, TrainPipelineBase):
            self._pipeline.reset()  # it would remember that the iterator before has ended


class Unpipelined(TrainPipeline[CTRBatch, TaskOutput]):
    """A step at a time: what pipelines overlap, in order."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device
    ) -> None:
        super().__init__()
        self._model = model
        self._optimizer = optimizer  # the name by which TorchRec's accumulation finds it
        self._device = device

    def progress(self, dataloader_iter: Iterator[CTRBatch]) -> TaskOutput:
        """Train one step."""
        batch = next(dataloader_iter).to(self._device)
        self._optimizer.zero_grad()
        loss, output = self._model(batch)
        loss.backward()
        self._optimizer.step()
        return output


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


def _pipeline(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    device: torch.device,
    options: PipelineOptions,
) -> TrainPipeline[CTRBatch, TaskOutput]:
    if options.debug:
        return Unpipelined(model, optimizer, device)
    if options.kind == "base":
        return TrainPipelineBase(model, optimizer, device)
    return OVERLAPPING[options.kind](model, optimizer, device, execute_all_batches=True)


def _joined(outputs: Sequence[TaskOutput]) -> TaskOutput:
    """One output for the micro-batches of a step."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    joined = {
        field.name: torch.cat([getattr(output, field.name) for output in outputs])
        for field in fields(last)
        if isinstance(getattr(last, field.name), Tensor) and field.name != "loss"
    }
    return replace(last, loss=torch.stack([output.loss for output in outputs]).sum(), **joined)
