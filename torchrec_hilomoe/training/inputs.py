"""Configuration -> what a run reads: schema, loaders of the splits, the schedule of stages."""

from dataclasses import replace
from math import lcm
from typing import Literal

import torch

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.data.loader import choose_num_canonical_shards, Loader
from torchrec_hilomoe.data.parquet import check_folder, load_schema, ParquetSource
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.data.synthetic import SyntheticSource
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.metrics.definitions import best_auc
from torchrec_hilomoe.training.pipelines.pipeline import PipelineOptions
from torchrec_hilomoe.training.stages import StageSchedule, StageTimeline

__all__ = ["Split", "best_auc_of", "loader_of", "pipelining_of", "schedule_of", "schema_of"]

Split = Literal["train", "valid", "test"]

SHOWN_DIFFERENCES = 10
PROBE_STEPS = 400  # after `init_from`, in a run of twice as many at least


def schema_of(config: RunConfig) -> Schema:
    """Return the columns; of a folder, without reading its rows.

    Raises:
        ValueError: If the folder is not whole, or not the one that the recipe is for.
    """
    data = config.data
    if data.path is None:
        if data.data_schema is not None:
            return data.data_schema
        return SyntheticSource(world=data.synthetic, split="train", rows=1, seed=config.seed).schema
    check_folder(data.path, None if data.data_schema is None else data.data_schema.dataset)
    schema = load_schema(data.path)
    recipe = None if data.data_schema is None else _with_counted_sizes(data.data_schema, schema)
    if recipe is not None and (found := recipe.differences(schema)):
        shown = "\n  ".join(found[:SHOWN_DIFFERENCES])
        raise ValueError(
            f"data.data_schema differs from the schema of {data.path} in {len(found)} places (here "
            f"is the recipe, there the folder):\n  {shown}\nSet data.data_schema to null to train "
            "on that folder, or give the folder that the recipe was written for."
        )
    if data.max_history is None:
        return schema
    return replace(
        schema,
        sequences=tuple(
            replace(group, max_length=min(group.max_length, data.max_history))
            for group in schema.sequences
        ),
    )


def _with_counted_sizes(recipe: Schema, folder: Schema) -> Schema:
    """The recipe's columns, with the folder's sizes of the tables whose values its rows decide."""
    rules = recipe.vocabularies.items()
    counted = (table for table, rule in rules if rule.kind in ("counted", "bucketed"))
    sizes = {table: folder.tables[table] for table in counted if table in folder.tables}
    return replace(recipe, tables={**recipe.tables, **sizes})


def loader_of(
    config: RunConfig, split: Split, world: World, *, start: LoaderState | None = None
) -> Loader:
    """Return an endless loader of the training split, or one pass over another."""
    training = split == "train"
    if training and start is None and config.data.num_canonical_shards is not None:
        start = _elastic_start(config.train.batch_size, world, config.data.num_canonical_shards)
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    return Loader(
        _source(config, split),
        batch_size=config.train.batch_size,
        world=world,
        seed=config.seed,
        shuffle=training and config.data.path is not None,  # generated rows have no order
        start=start,
        epochs=None if training else 1,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        max_bad_rows=config.data.max_bad_rows,
        bucket_by_length=config.data.bucket_by_length,
        pin_memory=on_gpu if config.data.pin_memory is None else config.data.pin_memory,
    )


def schedule_of(config: RunConfig, total_steps: int | None = None) -> StageSchedule:
    """Return the schedule that a configuration means.

    Args:
        config: The run.
        total_steps: Its length, where that is known; it decides lengths, not names.
    """
    train = config.train
    if train.stages is not None:
        return StageSchedule(stages=train.stages)
    if not config.model.hilomoe.enabled:
        return StageSchedule.plain(warmup_steps=train.warmup_steps)
    return StageSchedule.three_stages(
        num_layers=config.model.hilomoe.num_layers,
        backbone_share=train.backbone_share if config.init_from is None else 0.0,
        frozen_share=train.frozen_share,
        expert_lr_scale=train.expert_lr_scale,
        key_lr_scale=train.key_lr_scale,
        warmup_steps=train.warmup_steps,
        probe_steps=_probe_steps(config, total_steps),
    )


def _probe_steps(config: RunConfig, total_steps: int | None) -> int:
    """Steps that a run from a plain model begins with, to find what routes its experts."""
    experts = config.model.hilomoe
    if config.init_from is None or experts.route_by != "auto" or experts.probe_first:
        return 0
    half = PROBE_STEPS if total_steps is None else max(1, total_steps // 2)
    return experts.probe_steps or min(PROBE_STEPS, half)


def timeline_of(config: RunConfig, steps_per_epoch: int) -> StageTimeline:
    """Return where stages begin and end in a run of a configuration."""
    train = config.train
    total_steps = train.max_steps or train.epochs * steps_per_epoch
    return StageTimeline(
        schedule_of(config, total_steps),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        decay=train.decay,
        evaluate_every=train.evaluate_every,
        # Stages of one's own are those of the plain run, too.
        plain_warmup=train.warmup_steps if train.stages is None else None,
    )


def pipelining_of(config: RunConfig, schema: Schema) -> PipelineOptions:
    """Return how steps are driven."""
    train = config.train
    return PipelineOptions(
        kind=train.pipeline,
        debug=train.debug,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        sequences=schema.sequences,
    )


def best_auc_of(config: RunConfig, split: Split) -> float | None:
    """Return the AUC of the true probabilities; None for real data, where nobody knows them."""
    source = _source(config, split)
    return best_auc(source) if isinstance(source, SyntheticSource) else None


def _elastic_start(batch_size: int, world: World, shards: int) -> LoaderState:
    """Return the beginning of a run that may come to have other numbers of ranks."""
    multiple = lcm(world.size, shards)
    if batch_size % multiple:
        lower = batch_size // multiple * multiple
        nearest = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
        raise ValueError(
            f"data.num_canonical_shards {shards} and {world.size} ranks must divide "
            f"train.batch_size, got {batch_size}. Take {nearest}."
        )
    return LoaderState(
        epoch=0, lane_rows=0, num_canonical_shards=choose_num_canonical_shards(batch_size, multiple)
    )


def _source(config: RunConfig, split: Split) -> BlockSource:
    data = config.data
    if data.path is not None:
        return ParquetSource(data.path, split, schema_of(config))
    if data.data_schema is not None:
        raise ValueError(
            f"data.path is null, but the recipe is for {data.data_schema.dataset!r}: give the "
            "prepared folder as --data.path DIR, or count only with --dry_run."
        )
    rows = data.train_rows if split == "train" else data.eval_rows
    return SyntheticSource(world=data.synthetic, split=split, rows=rows, seed=config.seed)
