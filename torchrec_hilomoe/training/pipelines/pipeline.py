"""TorchRec's pipelines, driven as plain iterators."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import get_args, Literal

import torch
from torch import distributed as dist
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
from torchrec_hilomoe.embeddings.freezing import frozen_lookups
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask
from torchrec_hilomoe.training.metrics import Metrics, Predictions
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer
from torchrec_hilomoe.training.pipelines.microbatches import split_microbatches

__all__ = [
    "Pipeline",
    "PipelineKind",
    "PipelineOptions",
    "evaluate",
    "predict",
    "resolved_kind",
    "warm_up_buckets",
]

# Of two numbers there is one sum, whichever comes first.
ORDER_MATTERS_ABOVE = 2

# With a static graph DDP only counts in the first pass, and notes the order in the second.
PASSES = 2


def warm_up_buckets(model: DistributedModelParallel, batch: CTRBatch) -> None:
    """Make the first backward passes for nothing; a collective call.

    DDP gathers gradients in buckets, and after its first passes gathers them anew, in the order in
    which they came. The order in which ranks are added up depends on where in its bucket an
    element lies, so the first steps after wrapping round differently from the same steps in the
    middle of a stage. Here those passes leave no trace: no table learns from them, and random
    state and running statistics are put back.

    Args:
        model: Wrapped for its stage, not yet pipelined.
        batch: Any; it is not consumed.
    """
    task = model.module
    assert isinstance(task, TrainTask)
    tables = set(task.model.sparse.tables)
    learning = [p for p in task.parameters() if p.requires_grad and p not in tables]
    if dist.get_world_size() <= ORDER_MATTERS_ABOVE or not learning:
        return
    on_gpu = [model.device] if model.device.type == "cuda" else []
    statistics = [(buffer, buffer.clone()) for buffer in task.model.backbone.buffers()]
    with torch.random.fork_rng(devices=on_gpu), frozen_lookups(task.model.sparse):
        for _ in range(PASSES):
            loss, _ = model(batch.to(model.device))
            loss.backward()
    with torch.no_grad():
        for buffer, before in statistics:
            buffer.copy_(before)
    for parameter in learning:
        parameter.grad = None


PipelineKind = Literal["auto", "base", "sparse_dist", "prefetch", "semi_sync"]

OVERLAPPING: dict[PipelineKind, type[TrainPipelineSparseDist]] = {
    "sparse_dist": TrainPipelineSparseDist,
    "prefetch": PrefetchTrainPipelineSparseDist,
    "semi_sync": TrainPipelineSemiSync,
}


def resolved_kind(kind: PipelineKind, ranks: int) -> PipelineKind:
    """Say what ``auto`` is: a rank that is alone has nobody to exchange ids with.

    Example:
        >>> resolved_kind("auto", 1), resolved_kind("auto", 2)
        ('base', 'sparse_dist')
    """
    if kind != "auto":
        return kind
    return "base" if ranks == 1 else "sparse_dist"


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How steps are driven.

    Attributes:
        kind: Name of the way in which steps overlap; ``auto`` is ``base`` for one rank, and
            ``sparse_dist`` for several.
        debug: Whether steps run one after the other, without a pipeline.
        gradient_accumulation_steps: Number of micro-batches of a step.
        sequences: Sequence groups of the schema, by which micro-batches are split.
    """

    kind: PipelineKind = "auto"
    debug: bool = False
    gradient_accumulation_steps: int = 1
    sequences: tuple[SequenceGroup, ...] = ()

    def __post_init__(self) -> None:
        assert self.kind in get_args(PipelineKind)
        assert self.gradient_accumulation_steps >= 1


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
        if options.gradient_accumulation_steps > 1:
            config = GradientAccumulationConfig(
                is_enabled=True, num_steps=options.gradient_accumulation_steps
            )
            wrapper = GradientAccumulationWrapper(self._pipeline, optimizer, model, config)
            # Its first step would average gradients early, for DDP's static graph, which is off
            # here. A run that is resumed would then differ from one that was not by a rounding.
            wrapper.set_step(options.gradient_accumulation_steps)
            self._driven = wrapper
        self._model = model
        self._settled = False
        self._detached = False
        self._source: Iterator[CTRBatch] | None = None
        self._microbatches: Iterator[CTRBatch] = iter(())

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
        self.take(batches)
        outputs = [
            self._driven.progress(self._microbatches)
            for _ in range(self._options.gradient_accumulation_steps)
        ]
        return _joined(outputs)

    def detach(self) -> None:
        """Give the model its own forward back; the next :meth:`step` takes it again."""
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()
        self._detached = True

    def take(self, batches: Iterator[CTRBatch]) -> None:
        """Prepare to train ``batches``; :meth:`step` does, where it was not done before.

        The first ones make passes for nothing, which whoever listens to steps must not hear.
        """
        if batches is self._source:
            return
        options = self._options
        self._source = self._microbatches = batches
        if options.gradient_accumulation_steps > 1:
            self._microbatches = chain.from_iterable(
                split_microbatches(batch, options.gradient_accumulation_steps, options.sequences)
                for batch in batches
            )
        if not self._settled:
            first = next(self._microbatches)
            warm_up_buckets(self._model, first)
            self._microbatches = chain([first], self._microbatches)
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
    kind = resolved_kind(options.kind, dist.get_world_size())
    if kind == "base":
        return TrainPipelineBase(model, optimizer, device)
    return OVERLAPPING[kind](model, optimizer, device, execute_all_batches=True)


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


def evaluate(
    model: DistributedModelParallel,
    optimizers: OptimizersContainer,
    batches: Iterable[CTRBatch],
    each: Callable[[TaskOutput], None] = lambda _: None,
) -> Metrics:
    """Return the metrics of ``batches``, over all ranks; a collective call.

    The model, detached from a training pipeline, is left in evaluation mode; ``each`` is called
    with the output of every batch, in their order.
    """
    predictions = Predictions()
    for output in predict(model, optimizers.combined, iter(batches)):
        predictions.add(output.logits, output.labels, output.grouping_keys, output.weights)
        each(output)
    return predictions.metrics()
