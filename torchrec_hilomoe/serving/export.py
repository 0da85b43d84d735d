"""A checkpoint, or a ranker in memory, becomes an artifact."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from torchrec_hilomoe.command_line import parse_saved
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE
from torchrec_hilomoe.data.vocabularies import read_vocabulary, vocabulary_faults
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.hilomoe.remove import experts_never_vary, remove_hilomoe
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import CTRModel, TrainTask
from torchrec_hilomoe.runtime.checkout import commit_of
from torchrec_hilomoe.runtime.paths import path_manager
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.serving.artifact import (
    artifact_folder,
    Origin,
    PACKAGE_FILE,
    PROGRAM_FILE,
    REQUEST_FILE,
    write_manifest,
)
from torchrec_hilomoe.serving.model import ServedModel, ServedRequest
from torchrec_hilomoe.serving.package import compile_package
from torchrec_hilomoe.serving.program import (
    export_program,
    load_program,
    save_program,
    save_request,
)
from torchrec_hilomoe.serving.requests import vocabulary_of
from torchrec_hilomoe.serving.tables import Precision
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.auto_routing import decided_model
from torchrec_hilomoe.training.inputs import loader_of, schedule_of, schema_of
from torchrec_hilomoe.training.metrics import Predictions
from torchrec_hilomoe.training.stages.staging import activate_layers

__all__ = ["ExportOptions", "export_checkpoint", "export_model", "load_checkpoint"]

NOT_OF_THE_MODEL = ("optimizer.*", "loss_scale.*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        tables: Type in which numbers of tables are kept.
        package: Whether an AOTInductor package for the CPU is made, too.
        plain: Whether a checkpoint from before the experts' first stage is exported, without them.
        split: Split whose metrics by the exported program go into the manifest; null for none.

    Example:
        >>> ExportOptions(tables="int8").plain
        False
    """

    tables: Precision = "fp32"
    package: bool = False
    plain: bool = False
    split: Literal["valid", "test"] | None = "valid"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint as a ranker in memory.

    Attributes:
        task: The ranker, tables whole, in evaluation mode, computing what its stage does.
        config: The run.
        origin: What it is of.
    """

    task: TrainTask
    config: RunConfig
    origin: Origin


def export_checkpoint(
    path: str, out: str, overrides: tuple[str, ...] = (), options: ExportOptions | None = None
) -> Origin:
    """Export a checkpoint; needs a process group of one, as ``init_distributed`` makes it.

    Args:
        path: A folder ``step_N`` of a run.
        out: The artifact's folder, which must not exist yet.
        overrides: Dotted overrides of the run's configuration, such as ``--data.path DIR``: the
            vocabularies are read from there.
        options: How.

    Returns:
        What the artifact is of.

    Raises:
        ValueError: If the checkpoint is damaged or from before the experts' first stage, the
            vocabularies are missing or do not fit its tables, the data of ``options.split`` has
            other columns, or ``out`` is taken.
    """
    options = options or ExportOptions()
    loaded = load_checkpoint(path, overrides, plain=options.plain)
    model = loaded.task.model
    vocabularies = _vocabularies(model.sparse.schema, loaded.config.data.path)
    batches = None
    if options.split is not None:
        checkpoint.open(path.rstrip("/")).check_schema(schema_of(loaded.config))
        batches = partial(loader_of, loaded.config, options.split, World(rank=0, size=1))
    return export_model(
        model,
        out,
        options=options,
        origin=loaded.origin,
        vocabularies=vocabularies,
        batches=batches,
    )


def export_model(
    model: CTRModel,
    out: str | Path,
    *,
    options: ExportOptions | None = None,
    origin: Origin | None = None,
    vocabularies: Mapping[str, pa.Table] | None = None,
    batches: Callable[[], Iterable[CTRBatch]] | None = None,
) -> Origin:
    """Export a ranker that is in memory.

    Args:
        model: Its tables are not sharded. It is exported in evaluation mode and left in its own.
        out: The artifact's folder, which must not exist yet.
        options: How.
        origin: What it is of; by default a model of no checkpoint.
        vocabularies: Columns ``value`` and ``id`` of each table whose raw values are known.
        batches: Gives the batches of the options' split, anew each time; None measures nothing.
            Needs a process group, as :func:`export_checkpoint` does.

    Returns:
        What the artifact is of.

    Raises:
        ValueError: If ``out`` is taken.

    Example:
        >>> import tempfile
        >>> from torchrec_hilomoe.config import InjectionConfig, ModelConfig
        >>> from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup
        >>> from torchrec_hilomoe.models.build import build_task
        >>> clicks = IdFeature(name="clicks", table="item")
        >>> schema = Schema(
        ...     dataset="mine",
        ...     tables={"item": 100},
        ...     candidate=(IdFeature(name="item", table="item"),),
        ...     sequences=(SequenceGroup(name="clicks", fields=(clicks,), max_length=9),),
        ...     group="item",
        ... )
        >>> config = ModelConfig(backbone="din", hilomoe=InjectionConfig(enabled=False))
        >>> task = build_task(config, schema, torch.device("cpu"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(task.model, f"{folder}/din").expert_layers
        0
    """
    options = options or ExportOptions()
    origin = origin or origin_of(model, checkpoint="none", step=0, stage="none")
    origin = replace(origin, tables=options.tables)
    with _modes_kept(model), artifact_folder(os.fspath(out)) as folder:
        served = ServedModel(model, options.tables)
        program = export_program(served)
        save_program(program, f"{folder}/{PROGRAM_FILE}")
        if model.sparse.schema.sequences:
            save_request(export_program(ServedRequest(served)), f"{folder}/{REQUEST_FILE}")
        if options.package:
            compile_package(served, f"{folder}/{PACKAGE_FILE}")
        model.sparse.schema.save(f"{folder}/{SCHEMA_FILE}")
        for table, values in (vocabularies or {}).items():
            os.makedirs(f"{folder}/vocabularies", exist_ok=True)
            pq.write_table(values, f"{folder}/{vocabulary_of(table)}")
        if batches is not None:
            run = load_program(f"{folder}/{PROGRAM_FILE}")
            origin = replace(origin, split=options.split, metrics=measure(run, served, batches()))
            if options.tables != "fp32":
                whole = ServedModel(model)
                origin = replace(origin, fp32_metrics=measure(whole, served, batches()))
        write_manifest(folder, origin)
    logger.info("exported to %s", out)
    return origin


@torch.inference_mode()
def measure(
    run: Callable[..., Tensor], served: ServedModel, batches: Iterable[CTRBatch]
) -> Mapping[str, float]:
    """Return the metrics of a program, or of the model itself, on labelled batches."""
    predictions = Predictions()
    for batch in batches:
        logits_B = run(*served.layout.of_batch(batch).arguments)
        predictions.add(logits_B, batch.labels, batch.grouping_keys, batch.weights)
    return asdict(predictions.metrics())


def load_checkpoint(path: str, overrides: tuple[str, ...] = (), *, plain: bool = False) -> Loaded:
    """Load a checkpoint into a ranker whose tables are whole, in the memory of this process.

    Args:
        path: A folder ``step_N`` of a run.
        overrides: Dotted overrides of the run's configuration.
        plain: Whether experts that have not begun are left out; otherwise they are refused.

    Raises:
        ValueError: If it is damaged, or from before the experts' first stage and not ``plain``, or
            ``plain`` and its experts compute.
    """
    path = path.rstrip("/")
    saved = checkpoint.open(path)
    text, where = saved.document("config.yaml"), f"{path}/config.yaml"
    config = parse_saved(text, overrides, where=where).config
    wanted = config.model.hilomoe.enabled
    model = decided_model(config.model, saved.progress.decision)
    stage = schedule_of(config).named(saved.progress.stage)
    found_nothing = saved.progress.decision is not None and not model.hilomoe.enabled
    begun = model.hilomoe.enabled and stage.active_layers != 0
    if wanted and not begun and not found_nothing and not plain:
        raise ValueError(
            f"checkpoint {path} is of stage {stage.name!r}, before the experts' first one, so that "
            "its experts have learned nothing. Export a later checkpoint, or this one without "
            "experts: --plain"
        )
    if plain and begun:
        raise ValueError(
            f"checkpoint {path} is of stage {stage.name!r}, in which experts compute: without them "
            "it is another model than was trained. Leave out --plain."
        )
    task = build_task(model, saved.schema, torch.device("cpu"))
    saved.load({"model": task.state_dict()}, allow_missing=NOT_OF_THE_MODEL, restore_random=False)
    activate_layers(task, stage)
    progress = saved.progress
    origin = origin_of(task.model, checkpoint=path, step=progress.step, stage=progress.stage)
    trained = parse_saved(text, (), where=where).config  # whatever is overridden here
    if trained.data.path is None:
        origin = replace(origin, data_seed=trained.seed)
    if not begun or experts_never_vary(task):
        remove_hilomoe(task)
    return Loaded(task=task.eval(), config=config, origin=origin)


def origin_of(model: CTRModel, *, checkpoint: str, step: int, stage: str) -> Origin:
    """Say what an artifact of a ranker is of."""
    layers = [site.active_layers for site in sites_of(model).values()]
    return Origin(
        checkpoint=checkpoint,
        step=step,
        stage=stage,
        commit=commit_of(Path(__file__).parents[2]),
        backbone=type(model.backbone).__name__,
        expert_layers=max(layers, default=0),
        tables="fp32",
    )


@contextmanager
def _modes_kept(model: CTRModel) -> Iterator[None]:
    """Leave every module in the mode, training or evaluation, that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _vocabularies(schema: Schema, folder: str | None) -> dict[str, pa.Table]:
    """Read the raw values of every table that has some.

    Raises:
        ValueError: If the folder, or a vocabulary in it, is not there, cannot be read, or is of
            another folder.
    """
    found = {}
    for table, rule in schema.vocabularies.items():
        if rule.file is None:
            continue
        path = f"{folder}/{rule.file}"
        if folder is None or not path_manager.isfile(path):
            raise ValueError(
                f"the vocabulary of table {table!r} is not at {path}, and without it raw values "
                "have no ids. Name the prepared folder: --data.path DIR"
            )
        found[table] = read_vocabulary(path)
        if faults := list(vocabulary_faults(found[table], schema, table)):
            raise ValueError(
                f"the vocabulary of table {table!r} at {path} is not the checkpoint's: "
                f"{'; '.join(faults)}. Name the folder that it was trained on: --data.path DIR"
            )
    return found
