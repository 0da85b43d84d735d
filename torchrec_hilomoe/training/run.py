"""A whole run, from its configuration to ``summary.json``."""

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager, ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from torch import distributed as dist

from torchrec_hilomoe.command_line import ParsedRun
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task, with_widest_views
from torchrec_hilomoe.models.flops import Cost, cost_table, count_cost
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.runtime.distributed import broadcast_text, DistributedContext
from torchrec_hilomoe.runtime.documents import DocumentError
from torchrec_hilomoe.runtime.ownership import owned
from torchrec_hilomoe.runtime.paths import explain_full_disk, to_json, write_text
from torchrec_hilomoe.runtime.process import versions
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.auto_routing import (
    AutoRouting,
    chooses_routing,
    decided_model,
    decision_of,
    found_and_brought,
    Window,
    window_of,
)
from torchrec_hilomoe.training.auto_routing.probing import probe_aside
from torchrec_hilomoe.training.checkpoint.storage import Folder
from torchrec_hilomoe.training.inputs import (
    best_auc_of,
    loader_of,
    pipelining_of,
    schedule_of,
    schema_of,
    timeline_of,
)
from torchrec_hilomoe.training.log.reading import METRICS_FILE, read_summary, SUMMARY_FILE
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
from torchrec_hilomoe.training.stages import PlateauConfig
from torchrec_hilomoe.training.teaching import (
    documents_of,
    OpenTeacher,
    refuse_another,
    Teacher,
)
from torchrec_hilomoe.training.trainer import Intervals, Trainer
from torchrec_hilomoe.training.warm_start import warm_start

__all__ = ["how_to_go_on", "run_training"]

logger = logging.getLogger(__name__)

OWNER = ".owner"


@explain_full_disk()
def run_training(
    parsed: ParsedRun, context: DistributedContext, open_teacher: OpenTeacher | None = None
) -> None:
    """Train, evaluate and report; a collective call.

    Args:
        parsed: The run.
        context: This process among the ranks.
        open_teacher: Opens what ``train.teacher`` names; needed where it names something.

    Raises:
        ValueError: If the configuration, the data or a checkpoint does not fit.
    """
    config = parsed.config
    schema = schema_of(config)
    torch.manual_seed(config.seed)
    task = build_task(with_widest_views(config.model, schema), schema)
    cost = count_cost(task, schema, config.model.embedding_dim)
    check_capabilities(config.train, schedule_of(config).stages, context.device.type)
    teacher = None
    if config.train.teacher is not None:
        assert open_teacher is not None
        teacher = open_teacher(config.train.teacher, schema, config.data.path)
    if config.dry_run and config.out_dir is None:
        logger.info("%s", cost_table(cost))
        _tell_of_auto(config)
        logger.info("dry run: nothing is written; with --out_dir, the configuration and the counts")
        return
    folder = _make_folder(parsed, context)
    with _owned(folder, config, context):
        _run_in(folder, parsed, context, schema, task, cost, teacher)


def _run_in(
    folder: Path,
    parsed: ParsedRun,
    context: DistributedContext,
    schema: Schema,
    task: TrainTask,
    cost: Cost,
    teacher: Teacher | None,
) -> None:
    """Train, evaluate and report in a folder that nobody else writes to."""
    config = parsed.config
    ranks = counted(context.world.size, "rank")
    logger.info("run %s: %s, %s on %s", folder, parsed.recipe, ranks, context.device)
    logger.info("%s", cost_table(cost))
    if config.dry_run:
        _tell_of_auto(config)
        _write_config(folder, parsed, context)
        _write_summary(folder, context, _costs(cost))
        return
    checkpoints = _checkpoints_of(config, folder)
    resumed = _resumed_checkpoint(config.resume, checkpoints)
    if resumed is not None:
        if config.resume != "auto":
            _refuse_to_go_back(resumed.progress.step, checkpoints)
        resumed.check_schema(schema)
        refuse_another(resumed, teacher, config.train.teacher)
    progress = None if resumed is None else resumed.progress
    loader = loader_of(
        config, "train", context.world, start=progress.position if progress else None
    )
    timeline = timeline_of(config, loader.steps_per_epoch)
    total = timeline.total_steps
    decision, auto = progress.decision if progress else None, None
    report = None
    if chooses_routing(config):
        window = window_of(config, timeline, loader.steps_per_epoch)
        _refuse_undecided(progress, window)
        if window.aside and decision is None:
            aside = (
                "trained aside" if config.init_from is None else f"taken from {config.init_from}"
            )
            logger.info("route_by auto: a plain model is %s and probed first", aside)
            report = probe_aside(config, context)
            decision = decision_of(report, step=0)
        torch.manual_seed(config.seed)
        task = build_task(decided_model(config.model, decision), schema)
        auto = AutoRouting(task, config, window, decision)
    if decision is not None and decision.route_by is None:
        timeline.leave_out_experts(decision.brought.step if decision.brought else 0)
    assembly = assemble(config, task, context, decided=auto is None or decision is not None)
    start = progress.step if progress else 0
    with ExitStack() as open_until_the_end:
        log = open_until_the_end.enter_context(
            closing(RunLog(folder, total, start, enabled=context.is_main))
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
                **documents_of(teacher),
            },
            on_saved=log.saved,
        )
        open_until_the_end.enter_context(closing(saver))
        trainer = Trainer(
            assembly.model,
            assembly.optimizers,
            timeline,
            intervals=_intervals(config),
            log=log,
            saver=saver,
            watchdog=Watchdog(config.stall_seconds, f"rank {context.world.rank}"),
            pipelining=pipelining_of(config, schema),
            auto=auto,
        )
        if resumed is not None:
            trainer.load(resumed, config.allow_missing)
            log.say(f"resumed {resumed.path} at step {start} of {total}")
        elif config.init_from is not None:
            with_optimizer = config.train.init_optimizer
            began = warm_start(
                config.init_from,
                assembly.model,
                assembly.optimizers,
                with_optimizer=with_optimizer,
                allow_missing=config.allow_missing,
            )
            log.say(began.text())
        if trainer.is_complete and _is_tested(folder):
            log.say(f"{folder} is complete; raise train.max_steps, or give another --out_dir")
            return
        log.cut_back()
        if report is not None and decision is not None:
            log.decided(decision, report)
        _write_config(folder, parsed, context)
        _write_plan(folder, assembly.plan, context)
        if not trainer.fit(loader, loader_of(config, "valid", context.world), teacher):
            log.say(f"stopped at step {trainer.step} of {total}; {how_to_go_on(config, folder)}")
            return
        steps = trainer.step
        trainer.load_best()
        test = trainer.validate("test", loader_of(config, "test", context.world))
    if trainer.decision is not None:
        chosen = decided_model(config.model, trainer.decision)
        cost = count_cost(build_task(chosen, schema), schema, config.model.embedding_dim)
    best = best_auc_of(config, "test") if context.is_main else None
    plain = parsed.notes.of_seed(config.seed) if parsed.notes is not None else None
    summary = {
        "recipe": parsed.recipe,
        "dataset": schema.dataset,
        "test": asdict(test),
        "best_auc": best,
        **_costs(cost),
        "route_by": None if trainer.decision is None else asdict(trainer.decision),
        "without_experts": None if plain is None else asdict(plain),
        "teacher": None if teacher is None else teacher.description,
        "samples_per_second": trainer.samples_per_second,
        "steps": steps,
        "tested_step": trainer.step,
        "stages": [
            {"name": s.stage.name, "start": s.start, "stop": s.stop} for s in timeline.spans
        ],
    }
    _write_summary(folder, context, summary)
    beside = f" (the best that any model can reach: {best:.4f})" if best is not None else ""
    logger.info("test AUC %.4f%s; written to %s", test.auc, beside, folder)
    if trainer.decision is not None:
        for line in found_and_brought(trainer.decision, test.auc, plain):
            logger.info("%s", line)


def _tell_of_auto(config: RunConfig) -> None:
    """Say of what a dry run has counted."""
    if chooses_routing(config):
        logger.info(
            "route_by auto: counted with the widest features that it may find; it may find others, "
            "or none, and then there are no experts"
        )


def how_to_go_on(config: RunConfig, folder: Path) -> str:
    """Say with which options the same command goes on, where it would not by itself."""
    options = [f"--out_dir {shlex.quote(str(folder))}"] if config.out_dir is None else []
    options += [] if config.resume == "auto" else ["--resume auto"]
    if not options:
        return "run again to go on"
    return f"to go on, run again with {' '.join(options)}"


def _is_tested(folder: Path) -> bool:
    """Whether a run's summary is whole; one that is not is told, and made again."""
    try:
        return "test" in read_summary(folder)
    except DocumentError as error:
        logger.warning("%s It is made again.", str(error).partition(". ")[0] + ".")
        return False


def _intervals(config: RunConfig) -> Intervals:
    return Intervals(
        log_every=config.train.log_every,
        evaluate_every=config.train.evaluate_every,
        save_every=config.checkpoint.every_steps,
        best=PlateauConfig(metric=config.checkpoint.best) if config.checkpoint.best else None,
        early_stopping=config.train.early_stopping,
    )


def _make_folder(parsed: ParsedRun, context: DistributedContext) -> Path:
    """Make the run's folder and return its path on every rank.

    Raises:
        ValueError: If it cannot be made, or holds a run that would be overwritten.
    """
    config = parsed.config
    folder = Path(
        config.out_dir or broadcast_text(f"runs/{parsed.recipe}-{datetime.now():%Y%m%d-%H%M%S}")
    )
    checkpoints = _checkpoints_of(config, folder)
    used = (folder / METRICS_FILE).exists() or checkpoint.latest(checkpoints)
    dist.barrier()  # every rank has looked before the first one writes
    if used and (config.dry_run or config.resume == "never"):
        option = "dry_run is true" if config.dry_run else "resume is 'never'"
        raise ValueError(
            f"out_dir {folder} already holds a run and {option}. Give another --out_dir, or "
            "--resume auto to go on with that run."
        )
    if context.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"out_dir {folder} cannot be made: {error}. Give another --out_dir."
            ) from error
    dist.barrier()
    return folder


def _checkpoints_of(config: RunConfig, folder: Path) -> str:
    return config.checkpoint.folder or str(folder / "checkpoints")


@contextmanager
def _owned(folder: Path, config: RunConfig, context: DistributedContext) -> Iterator[None]:
    """Own the folders that a run writes to, or refuse it on every rank; a collective call."""
    places = {f"out_dir {folder}": str(folder)}
    if not config.dry_run:
        elsewhere = config.checkpoint.folder
        what = "out_dir" if elsewhere is None else "checkpoint.folder"
        checkpoints = _checkpoints_of(config, folder)
        places[f"{what} {checkpoints}"] = checkpoints
    with ExitStack() as held:
        problem = ""
        if context.is_main:
            try:
                locks: dict[str, str] = {}  # both may be one folder, under two names
                for what, place in places.items():
                    if "://" not in place:
                        Path(place).mkdir(parents=True, exist_ok=True)
                        locks.setdefault(os.path.realpath(place), what)
                for place, what in locks.items():
                    held.enter_context(owned(Path(place) / OWNER, what))
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := broadcast_text(problem):
            raise ValueError(problem)
        yield


def _write_config(folder: Path, parsed: ParsedRun, context: DistributedContext) -> None:
    """Keep the configuration; only once it is known to fit what the folder already holds."""
    if context.is_main:
        write_text(str(folder / "config.yaml"), parsed.resolved)


def _write_plan(folder: Path, plan: PlanReport, context: DistributedContext) -> None:
    """Keep where the tables are, for people and for programs."""
    if context.is_main:
        write_text(str(folder / "plan.txt"), plan.text())
        write_text(str(folder / "plan.json"), plan.to_json())


def _resumed_checkpoint(resume: str, folder: str) -> checkpoint.Checkpoint | None:
    if resume == "never":
        return None
    return (
        checkpoint.newest_sound(folder) if resume == "auto" else checkpoint.open(resume.rstrip("/"))
    )


def _refuse_to_go_back(step: int, folder: str) -> None:
    """Refuse to overwrite later checkpoints of the run that is gone on with."""
    newest = max(Folder(folder).checkpoints(), default=0)
    if newest > step:
        raise ValueError(
            f"resume is a checkpoint of step {step}, but {folder} already holds step "
            f"{newest}, which would be overwritten. Give another --out_dir, or --resume auto."
        )


def _refuse_undecided(progress: checkpoint.Progress | None, window: Window) -> None:
    """Refuse to go on with a run in which experts were there before anything was found."""
    if progress is None or progress.decision is not None:
        return
    if window.aside and progress.step > 0:
        raise ValueError(
            f"model.hilomoe.route_by is auto, but the checkpoint of step {progress.step} is of a "
            "run that has not found its features before its first step, as this one would. Go on "
            "with --model.hilomoe.probe_first false, as it began, or give another --out_dir."
        )
    if progress.step > window.stop:
        raise ValueError(
            f"model.hilomoe.route_by is auto, but the checkpoint is of step {progress.step}, after "
            f"experts began at step {window.stop}, and says of no features that were found. Give "
            "the route_by that it was trained with, or another --out_dir."
        )


def _costs(cost: Cost) -> dict[str, object]:
    return {
        "parameters": dict(cost.parameters),
        "activated_parameters": dict(cost.activated),
        "flops": dict(cost.flops),
        "training_flops": cost.training_flops,
        "lookup_bytes": cost.lookup_bytes,
    }


def _write_summary(folder: Path, context: DistributedContext, content: dict[str, object]) -> None:
    if not context.is_main:
        return
    where = {
        "world_size": context.world.size,
        "device": str(context.device),
        "versions": versions(),
    }
    write_text(str(folder / SUMMARY_FILE), to_json({**content, **where}) + "\n")
