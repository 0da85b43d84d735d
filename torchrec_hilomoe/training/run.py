"""A whole run, from its configuration to ``summary.json``."""

import json
import logging
import platform
from contextlib import closing, ExitStack
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import distributed as dist

from torchrec_hilomoe.command_line import ParsedRun
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import Cost, cost_table, count_cost
from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.runtime.distributed import broadcast_text, Job
from torchrec_hilomoe.runtime.full_disk import full_disk_told
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.inputs import (
    best_auc_of,
    loader_of,
    pipelining_of,
    schedule_of,
    schema_of,
)
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.sharding.report import PlanReport
from torchrec_hilomoe.training.stages import Course, Plateau
from torchrec_hilomoe.training.trainer import Rhythm, Trainer
from torchrec_hilomoe.training.warm_start import warm_start

__all__ = ["run_training"]

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


@full_disk_told()
def run_training(parsed: ParsedRun, job: Job) -> None:
    """Train, evaluate and report; a collective call.

    Raises:
        ValueError: If the configuration, the data or a checkpoint does not fit.
    """
    config = parsed.config
    schema = schema_of(config)
    torch.manual_seed(config.seed)
    task = build_task(config.model, schema)
    cost = count_cost(task, schema, config.model.embedding_dim)
    check_capabilities(config.train, schedule_of(config).stages, job.device.type)
    folder = _make_folder(parsed, job)
    ranks = counted(job.world.size, "rank")
    logger.info("run %s: %s, %s on %s", folder, parsed.recipe, ranks, job.device)
    logger.info("%s", cost_table(cost))
    if config.dry_run:
        _write_config(folder, parsed, job)
        _write_summary(folder, job, _costs(cost))
        return
    checkpoints = config.checkpoint.folder or str(folder / "checkpoints")
    resumed = _resumed_checkpoint(config.resume, checkpoints)
    progress = checkpoint.read_progress(resumed) if resumed else None
    if progress:
        _refuse_to_go_back(progress.step, checkpoints)
    if resumed:
        checkpoint.check_schema(resumed, schema)
    loader = loader_of(config, "train", job.world, start=progress.position if progress else None)
    total = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    course = Course(
        schedule_of(config),
        total_steps=total,
        steps_per_epoch=loader.steps_per_epoch,
        decay=config.train.rate_decay,
        evaluate_every=config.train.evaluate_every,
    )
    assembly = assemble(config, task, job)
    start = progress.step if progress else 0
    with ExitStack() as open_until_the_end:
        log = open_until_the_end.enter_context(
            closing(RunLog(folder, total, start, enabled=job.is_main))
        )
        saver = checkpoint.Saver(
            checkpoints,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            documents={
                "config.yaml": parsed.resolved,
                "schema.json": schema.to_json() + "\n",
                "plan.json": assembly.plan.to_json(),
                "plan.txt": assembly.plan.text(),
            },
            on_saved=log.saved,
        )
        open_until_the_end.enter_context(closing(saver))
        trainer = Trainer(
            assembly.model,
            assembly.learners,
            course,
            rhythm=_rhythm(config),
            log=log,
            saver=saver,
            watchdog=Watchdog(config.stall_seconds, f"rank {job.world.rank}"),
            pipelining=pipelining_of(config, schema),
        )
        if resumed:
            trainer.restore(resumed, config.allow_missing)
            log.say(f"resumed {resumed} at step {start} of {total}")
        elif config.init_from is not None:
            with_optimizer = config.train.init_optimizer
            began = warm_start(
                config.init_from, assembly.model, assembly.learners, with_optimizer=with_optimizer
            )
            log.say(began.text())
        if trainer.is_complete and (folder / SUMMARY).exists():
            log.say(f"{folder} is complete; raise train.max_steps, or give another --out_dir")
            return
        log.cut_back()
        _write_config(folder, parsed, job)
        _write_plan(folder, assembly.plan, job)
        if not trainer.fit(loader, loader_of(config, "valid", job.world)):
            log.say(f"stopped at step {trainer.step} of {total}; run again to go on")
            return
        steps = trainer.step
        trainer.restore_best()
        test = trainer.validate("test", loader_of(config, "test", job.world))
    best = best_auc_of(config, "test") if job.is_main else None
    summary = {
        "recipe": parsed.recipe,
        "test": asdict(test),
        "best_auc": best,
        **_costs(cost),
        "samples_per_second": trainer.samples_per_second,
        "steps": steps,
        "tested_step": trainer.step,
        "stages": [{"name": s.stage.name, "start": s.start, "stop": s.stop} for s in course.spans],
    }
    _write_summary(folder, job, summary)
    beside = f" (the best that any model can reach: {best:.4f})" if best is not None else ""
    logger.info("test AUC %.4f%s; written to %s", test.auc, beside, folder)


def _rhythm(config: RunConfig) -> Rhythm:
    return Rhythm(
        log_every=config.train.log_every,
        evaluate_every=config.train.evaluate_every,
        save_every=config.checkpoint.every_steps,
        best=Plateau(metric=config.checkpoint.best) if config.checkpoint.best else None,
        early_stopping=config.train.early_stopping,
    )


def _make_folder(parsed: ParsedRun, job: Job) -> Path:
    """Make the run's folder and return its path on every rank.

    Raises:
        ValueError: If it cannot be made, or holds a run that would be overwritten.
    """
    config = parsed.config
    folder = Path(
        config.out_dir or broadcast_text(f"runs/{parsed.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    )
    checkpoints = config.checkpoint.folder or folder / "checkpoints"
    used = (folder / "metrics.jsonl").exists() or checkpoint.latest(checkpoints)
    dist.barrier()  # every rank has looked before the first one writes
    if used and (config.dry_run or config.resume == "never"):
        option = "dry_run is true" if config.dry_run else "resume is 'never'"
        raise ValueError(
            f"out_dir {folder} already holds a run and {option}. Give another --out_dir, or "
            "--resume auto to go on with that run."
        )
    if job.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"out_dir {folder} cannot be made: {error}. Give another --out_dir."
            ) from error
    dist.barrier()
    return folder


def _write_config(folder: Path, parsed: ParsedRun, job: Job) -> None:
    """Keep the configuration; only once it is known to fit what the folder already holds."""
    if job.is_main:
        (folder / "config.yaml").write_text(parsed.resolved)


def _write_plan(folder: Path, plan: PlanReport, job: Job) -> None:
    """Keep where the tables are, for people and for programs."""
    if job.is_main:
        (folder / "plan.txt").write_text(plan.text())
        (folder / "plan.json").write_text(plan.to_json())


def _resumed_checkpoint(resume: str, folder: str) -> str | None:
    if resume == "never":
        return None
    return checkpoint.latest(folder) if resume == "auto" else resume.rstrip("/")


def _refuse_to_go_back(step: int, folder: str) -> None:
    """Refuse to overwrite later checkpoints of the run that is gone on with."""
    newest = checkpoint.latest(folder)
    if newest is not None and (newest_step := checkpoint.read_progress(newest).step) > step:
        raise ValueError(
            f"resume is a checkpoint of step {step}, but {folder} already holds step "
            f"{newest_step}, which would be overwritten. Give another --out_dir, or --resume auto."
        )


def _costs(cost: Cost) -> dict[str, object]:
    return {
        "parameters": dict(cost.parameters),
        "activated_parameters": dict(cost.activated),
        "flops": dict(cost.flops),
        "training_flops": cost.training_flops,
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
    (folder / SUMMARY).write_text(json.dumps({**content, **where}, indent=2) + "\n")
