"""A probe of the package's own models, and passes that it hears though nothing learns."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.embeddings.freezing import frozen_lookups
from torchrec_hilomoe.hilomoe import InteractionProbe, LossTerms
from torchrec_hilomoe.models.build import site_patterns
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask

__all__ = ["probe_of", "run_unchanged"]


def probe_of(task: TrainTask, experts: InjectionConfig, **options: Any) -> InteractionProbe:
    """Make a probe of a plain model, whose query must have the histories' means when it listens.

    Args:
        task: The model, not its wrapper.
        experts: What is thought of.
        options: Further ones of the probe.
    """
    backbone = task.model.backbone
    return InteractionProbe(
        task,
        experts,
        [f"model.backbone.{pattern}" for pattern in site_patterns(backbone, experts)],
        "model.backbone.sample",
        task.model.sparse.columns,
        tokens={
            f"model.backbone.{pattern}": f"model.backbone.{module}"
            for pattern, module in backbone.tokens.items()
        },
        loss_terms=lambda batch: LossTerms(
            weights=batch.weights, denominator=batch.loss_denominator / task.loss_scale
        ),
        **options,
    )


def run_unchanged(
    model: DistributedModelParallel, batches: Iterable[CTRBatch]
) -> Iterator[TaskOutput]:
    """Make forward and backward passes that change nothing, as the outputs are asked for.

    Args:
        model: The sharded model, in no pipeline.
        batches: As many on every rank.
    """
    task = model.module
    assert isinstance(task, TrainTask)
    model.train()
    with _unchanged(task):
        for batch in batches:
            loss, output = task(batch.to(model.device))
            loss.backward()
            task.zero_grad()
            yield output


@contextmanager
def _unchanged(task: TrainTask) -> Iterator[None]:
    """Let no table learn, and put running statistics back."""
    kept = [(buffer, buffer.clone()) for buffer in task.model.backbone.buffers()]
    try:
        with frozen_lookups(task.model.sparse):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
