"""A checkpoint, evaluated: its metrics, and what its routers do."""

import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.hilomoe.report import record_routing, routing_report, RoutingReport
from torchrec_hilomoe.hilomoe.sites import sites_of
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import Job
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.inputs import loader_of, schedule_of, schema_of, Split
from torchrec_hilomoe.training.log.curves import finite
from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.metrics.slices import Slicer
from torchrec_hilomoe.training.pipelines.evaluate import evaluate
from torchrec_hilomoe.training.stages.staging import activate_layers
from torchrec_hilomoe.training.trainer import training_state

__all__ = ["Evaluation", "evaluate_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a checkpoint does on a split.

    Attributes:
        step: Optimizer steps that it was trained for.
        metrics: Over all rows of the split.
        routing: Over all rows; None where no expert computes.
        slices: By value of a feature, the largest first; None where none was asked for.
    """

    step: int
    metrics: Metrics
    routing: RoutingReport | None
    slices: Mapping[int, Metrics] | None = None

    def to_json(self, split: Split) -> str:
        """Serialise; what has no value is null."""
        return json.dumps(_nulled({"split": split, **asdict(self)}), indent=2)


def _nulled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _nulled(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(entry) for entry in value]
    return finite(value)


def evaluate_checkpoint(
    path: str, split: Split, overrides: tuple[str, ...], job: Job, *, slice_by: str | None = None
) -> Evaluation:
    """Load a checkpoint and evaluate it; a collective call.

    Args:
        path: A folder ``step_N`` of a run.
        split: Which rows.
        overrides: Dotted overrides of the run's configuration, such as ``--data.path DIR``.
        job: This process among the ranks; as many as one likes, not only as in training.
        slice_by: A feature by whose values metrics are split as well.

    Raises:
        ValueError: If the checkpoint, its configuration or the data does not fit.
    """
    progress = checkpoint.read_progress(path)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
        recipe.write(checkpoint.read_document(path, "config.yaml"))
        recipe.flush()
        config = parse_run(["--config", recipe.name, *overrides]).config
    torch.manual_seed(config.seed)
    schema = schema_of(config)
    checkpoint.check_schema(path, schema)
    slicer = Slicer(schema, slice_by) if slice_by is not None else None
    assembly = assemble(config, build_task(config.model, schema), job)
    state = training_state(assembly.model, assembly.learners)
    checkpoint.load(path, state, allow_missing=config.allow_missing)
    stage = schedule_of(config).named(progress.stage)
    task = assembly.model.module
    activate_layers(task, stage)
    routed = any(site.active_layers for site in sites_of(task).values())
    with record_routing(task) if routed else nullcontext():
        loader = loader_of(config, split, job.world)
        if slicer is None:
            metrics = evaluate(assembly.model, assembly.learners, loader)
        else:
            batches = slicer.watch(loader)
            metrics = evaluate(assembly.model, assembly.learners, batches, slicer.take)
    return Evaluation(
        step=progress.step,
        metrics=metrics,
        routing=routing_report(task) if routed else None,
        slices=slicer.predictions.metrics() if slicer is not None else None,
    )
