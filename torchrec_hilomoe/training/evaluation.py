"""A checkpoint, evaluated: its metrics, also by value of a feature, and what its routers do."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from torchrec_hilomoe.command_line import parse_saved
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.parquet import raw_values
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.hilomoe.report import record_routing, routing_report, RoutingReport
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.paths import to_json
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.auto_routing import decided_model
from torchrec_hilomoe.training.inputs import loader_of, schedule_of, schema_of, Split
from torchrec_hilomoe.training.metrics import Metrics, SlicedPredictions
from torchrec_hilomoe.training.pipelines.pipeline import evaluate
from torchrec_hilomoe.training.stages.staging import activate_layers
from torchrec_hilomoe.training.trainer import training_state

__all__ = ["Evaluation", "Slicer", "evaluate_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a checkpoint does on a split.

    Attributes:
        step: Optimizer steps that it was trained for.
        metrics: Over all rows of the split.
        routing: Over all rows; None where no expert computes.
        slices: Metrics by value of a feature, the raw one where the data's vocabulary tells it, the
            largest slice first; None where none was asked for.
    """

    step: int
    metrics: Metrics
    routing: RoutingReport | None
    slices: Mapping[int | str, Metrics] | None = None

    def to_json(self, split: Split) -> str:
        """Serialise; what has no value is null."""
        return to_json({"split": split, **asdict(self)})


def evaluate_checkpoint(
    path: str,
    split: Split,
    overrides: tuple[str, ...],
    context: DistributedContext,
    *,
    slice_by: str | None = None,
) -> Evaluation:
    """Load a checkpoint and evaluate it; a collective call.

    Args:
        path: A folder ``step_N`` of a run.
        split: Which rows.
        overrides: Dotted overrides of the run's configuration, such as ``--data.path DIR``.
        context: This process among the ranks; as many as one likes, not only as in training.
        slice_by: A feature by whose values metrics are split as well.

    Raises:
        ValueError: If the checkpoint, its configuration or the data does not fit.
    """
    saved = checkpoint.open(path)
    where = f"{path}/config.yaml"
    config = parse_saved(saved.document("config.yaml"), overrides, where=where).config
    torch.manual_seed(config.seed)
    schema = schema_of(config)
    saved.check_schema(schema)
    slicer = Slicer(schema, slice_by, config.data.path) if slice_by is not None else None
    model = decided_model(config.model, saved.progress.decision)
    assembly = assemble(config, build_task(model, schema), context)
    state = training_state(assembly.model, assembly.optimizers)
    saved.load(state, allow_missing=config.allow_missing)
    stage = schedule_of(config).named(saved.progress.stage)
    task = assembly.model.module
    activate_layers(task, stage)
    routed = any(site.active_layers for site in sites_of(task).values())
    with record_routing(task) if routed else nullcontext():
        loader = loader_of(config, split, context.world)
        if slicer is None:
            metrics = evaluate(assembly.model, assembly.optimizers, loader)
        else:
            batches = slicer.watch(loader)
            metrics = evaluate(assembly.model, assembly.optimizers, batches, slicer.take)
    return Evaluation(
        step=saved.progress.step,
        metrics=metrics,
        routing=routing_report(task) if routed else None,
        slices=slicer.metrics() if slicer is not None else None,
    )


class Slicer:
    """Remembers a feature of the batches that go in, until their outputs come.

    Args:
        schema: Of the batches.
        feature: A column of one id a row: of the candidate, the context, or the group.
        folder: The prepared folder, whose vocabulary says what ids stand for; None if generated.

    Raises:
        ValueError: If there is no such column.

    Attributes:
        predictions: Predictions by value of the feature.
    """

    def __init__(self, schema: Schema, feature: str, folder: str | None = None) -> None:
        single = {field.name for field in schema.candidate} | {schema.group}
        single |= {field.name for field in schema.pooled if field.max_length == 1}
        if feature not in single:
            raise ValueError(
                f"slice is {feature!r}, but a slice needs a column of one id a row; here these "
                f"are {', '.join(sorted(single))}."
            )
        self.predictions = SlicedPredictions(feature)
        self._feature = feature
        self._names = {} if folder is None else raw_values(folder, schema, feature)
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

    def metrics(self) -> dict[int | str, Metrics]:
        """Return metrics by raw value, or by id where that is not known; a collective call."""
        found = self.predictions.metrics()
        return {self._names.get(value, value): metrics for value, metrics in found.items()}

    def _values(self, batch: CTRBatch) -> Tensor:
        if self._feature in batch.unpooled.keys():  # noqa: SIM118  # not a dict
            return batch.unpooled[self._feature].values()
        if self._feature not in batch.pooled.keys():  # noqa: SIM118
            return batch.grouping_keys
        ids = batch.pooled[self._feature]
        values_B = torch.zeros_like(batch.grouping_keys)
        has_id_B = ids.lengths()[: len(values_B)] > 0  # a row without one has the unknown one
        values_B[has_id_B] = ids.values().long()
        return values_B
