"""A whole run, from its configuration to ``summary.json``."""

import json
import logging
import platform
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import distributed as dist

from torchrec_hilomoe.command_line import ParsedRun
from torchrec_hilomoe.config import DataConfig, RunConfig
from torchrec_hilomoe.data.batch import Position
from torchrec_hilomoe.data.loader import Loader, World
from torchrec_hilomoe.data.parquet import check_folder, load_schema, ParquetSource
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.data.synthetic import best_auc, SyntheticSource
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import Cost, cost_table, count_cost
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import broadcast_text, Job
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.logging import RunLog
from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.optimizers import Learners
from torchrec_hilomoe.training.sharding import (
    describe_plan,
    fuse_table_optimizer,
    plan_tables,
    shard,
)
from torchrec_hilomoe.training.stages import StageSchedule, StageSpan
from torchrec_hilomoe.training.trainer import Rhythm, Trainer

__all__ = ["run_training"]

logger = logging.getLogger(__name__)


def run_training(parsed: ParsedRun, job: Job) -> None:
    """Train, evaluate and report; a collective call.

    Raises:
        ValueError: If the configuration, the data or a checkpoint does not fit.
    """
    config = parsed.config
    schema = _schema(config.data, config.seed)
    torch.manual_seed(config.seed)
    task = build_task(config.model, schema)
    cost = count_cost(task, schema, config.model.embedding_dim)
    folder = _make_folder(parsed, job)
    logger.info("run %s: %s, %d ranks on %s", folder, parsed.recipe, job.world.size, job.device)
    logger.info("%s", cost_table(cost))
    if config.dry_run:
        _write_summary(folder, job, _costs(cost))
        return
    resumed = _resumed_checkpoint(config.resume, folder)
    progress = checkpoint.read_progress(resumed) if resumed else None
    loader = _loader(config, "train", job.world, start=progress.position if progress else None)
    total = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    spans = schedule_of(config).place(total)
    trainer = _trainer(config, job, task, spans, folder, progress.step if progress else 0)
    if resumed:
        trainer.restore(resumed)
        logger.info("resumed %s at step %d of %d", resumed, trainer.step, total)
    if not trainer.fit(loader, _loader(config, "valid", job.world)):
        logger.info("stopped at step %d of %d; run again to go on", trainer.step, total)
        return
    test = trainer.validate("test", _loader(config, "test", job.world))
    trainer.close()
    best = _best_auc(config) if job.is_main else None
    _write_summary(
        folder,
        job,
        {
            "recipe": parsed.recipe,
            "test": asdict(test),
            "best_auc": best,
            **_costs(cost),
            "samples_per_second": trainer.samples_per_second,
            "steps": trainer.step,
            "stages": [
                {"name": span.stage.name, "start": span.start, "stop": span.stop} for span in spans
            ],
        },
    )
    _say_result(test, best, folder)


def schedule_of(config: RunConfig) -> StageSchedule:
    """Return the schedule that a configuration means."""
    train = config.train
    if train.stages is not None:
        return StageSchedule(stages=train.stages)
    if config.model.hilomoe is None:
        return StageSchedule.plain(warmup_steps=train.warmup_steps)
    return StageSchedule.three_stages(
        num_layers=config.model.hilomoe.num_layers,
        backbone_share=train.backbone_share,
        frozen_share=train.frozen_share,
        expert_rate=train.expert_rate,
        warmup_steps=train.warmup_steps,
    )


def _schema(data: DataConfig, seed: int) -> Schema:
    """The columns; of a folder, without reading its rows."""
    if data.path is None:
        if data.data_schema is not None:
            return data.data_schema
        return SyntheticSource(world=data.world, split="train", rows=1, seed=seed).schema
    check_folder(data.path)
    schema = load_schema(data.path)
    if data.data_schema is not None and data.data_schema != schema:
        raise ValueError(
            f"data.data_schema differs from the schema of {data.path}; set data.data_schema to "
            "null to train on that folder, or give the folder that the recipe was written for."
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


def _source(config: RunConfig, split: str) -> BlockSource:
    data = config.data
    if data.path is not None:
        return ParquetSource(data.path, split, _schema(data, config.seed))
    if data.data_schema is not None:
        raise ValueError(
            f"data.path is null, but the recipe is for {data.data_schema.dataset!r}: give the "
            "prepared folder as --data.path DIR, or count only with --dry_run."
        )
    rows = data.train_rows if split == "train" else data.eval_rows
    return SyntheticSource(world=data.world, split=split, rows=rows, seed=config.seed)


def _loader(
    config: RunConfig, split: str, world: World, *, start: Position | None = None
) -> Loader:
    training = split == "train"
    return Loader(
        _source(config, split),
        batch_size=config.train.batch_size,
        world=world,
        seed=config.seed,
        shuffle=training and config.data.path is not None,
        start=start,
        epochs=None if training else 1,
        prefetch=config.data.prefetch,
        max_bad_rows=config.data.max_bad_rows,
    )


def _trainer(
    config: RunConfig,
    job: Job,
    task: TrainTask,
    spans: tuple[StageSpan, ...],
    folder: Path,
    start: int,
) -> Trainer:
    train = config.train
    fuse_table_optimizer(
        task.model.sparse, train.table_optimizer, train.table_learning_rate, job.device
    )
    plan = plan_tables(task, train.batch_size // job.world.size, job.device)
    for line in describe_plan(plan):
        logger.info("table %s", line)
    # Tables are drawn on each rank for itself, so ranks must not draw the same numbers.
    torch.manual_seed(config.seed * 100_003 + job.world.rank + 1)
    model = shard(task, plan, job.device)
    return Trainer(
        model,
        Learners(model, train.learning_rate, train.table_learning_rate),
        spans,
        rhythm=Rhythm(
            log_every=train.log_every,
            evaluate_every=train.evaluate_every,
            save_every=config.checkpoint.every_steps,
            keep=config.checkpoint.keep,
            decay=train.decay,
        ),
        log=RunLog(folder, spans[-1].stop, start, enabled=job.is_main),
        folder=folder / "checkpoints",
    )


def _make_folder(parsed: ParsedRun, job: Job) -> Path:
    """Make the run's folder, write its configuration, and return its path on every rank."""
    config = parsed.config
    folder = Path(
        config.out_dir or broadcast_text(f"runs/{parsed.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    )
    used = (folder / "metrics.jsonl").exists() or checkpoint.latest(folder / "checkpoints")
    dist.barrier()  # every rank has looked before the first one writes
    if used and config.resume == "never":
        raise ValueError(
            f"out_dir {folder} already holds a run and resume is 'never'. Give another --out_dir, "
            "or --resume auto to go on with that run."
        )
    if job.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(parsed.resolved)
    dist.barrier()
    return folder


def _resumed_checkpoint(resume: str, folder: Path) -> Path | None:
    if resume == "never":
        return None
    return checkpoint.latest(folder / "checkpoints") if resume == "auto" else Path(resume)


def _best_auc(config: RunConfig) -> float | None:
    source = _source(config, "test")
    return best_auc(source) if isinstance(source, SyntheticSource) else None


def _costs(cost: Cost) -> dict[str, object]:
    return {
        "parameters": dict(cost.parameters),
        "flops": dict(cost.flops),
        "lookup_bytes": cost.lookup_bytes,
    }


def _write_summary(folder: Path, job: Job, content: dict[str, object]) -> None:
    if not job.is_main:
        return
    where = {
        "world_size": job.world.size,
        "device": str(job.device),
        "versions": {name: version(name) for name in ("torch", "torchrec", "torchrec-hilomoe")}
        | {"python": platform.python_version()},
    }
    (folder / "summary.json").write_text(json.dumps({**content, **where}, indent=2) + "\n")


def _say_result(test: Metrics, best: float | None, folder: Path) -> None:
    beside = f" (the best that any model can reach: {best:.4f})" if best is not None else ""
    logger.info("test AUC %.4f%s; written to %s", test.auc, beside, folder)
