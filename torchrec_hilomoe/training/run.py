"""A whole run, from its configuration to ``summary.json``."""

import logging
import shlex
from contextlib import closing, ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from torchrec_hilomoe.command_line import ParsedRun
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task, with_widest_views
from torchrec_hilomoe.models.flops import Cost, cost_table, count_cost
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.paths import explain_full_disk
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.auto_routing import (
    AutoRouting,
    chooses_routing,
    decided_model,
    found_and_brought,
    window_of,
)
from torchrec_hilomoe.training.auto_routing.beginning import find_before, Found, refuse_other_views
from torchrec_hilomoe.training.inputs import (
    best_auc_of,
    loader_of,
    pipelining_of,
    schedule_of,
    schema_of,
    timeline_of,
)
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.run_folder import RunFolder
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.stages import PlateauConfig
from torchrec_hilomoe.training.stages.staging import check_stages
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
    schedule = schedule_of(config, config.train.max_steps)
    check_stages(task, schedule.stages)
    if config.train.max_steps is not None and not schedule.counts_epochs:
        schedule.place(config.train.max_steps)  # refuses what does not fit, also of a dry run
    check_capabilities(config.train, schedule.stages, context.device.type)
    teacher = None
    if config.train.teacher is not None:
        assert open_teacher is not None
        teacher = open_teacher(config.train.teacher, schema, config.data.path, config.seed)
    if config.dry_run and config.out_dir is None:
        logger.info("%s", cost_table(cost))
        _tell_of_auto(config)
        logger.info("dry run: nothing is written; with --out_dir, the configuration and the counts")
        return
    folder = RunFolder(parsed, context)
    with folder.owned():
        _run_in(folder, parsed, context, schema, task, cost, teacher)


def _run_in(
    folder: RunFolder,
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
    logger.info("run %s: %s, %s on %s", folder.path, parsed.recipe, ranks, context.device)
    logger.info("%s", cost_table(cost))
    if config.dry_run:
        _tell_of_auto(config)
        folder.write_config()
        folder.write_summary(_costs(cost))
        return
    resumed = folder.resumed()
    if resumed is not None:
        resumed.check_schema(schema)
        refuse_another(resumed, teacher, config.train.teacher)
        refuse_other_views(config, resumed)
    progress = None if resumed is None else resumed.progress
    loader = loader_of(
        config, "train", context.world, start=progress.position if progress else None
    )
    # Opened before the work, which a split without rows would end.
    validation = loader_of(config, "valid", context.world)
    test_rows = loader_of(config, "test", context.world)
    timeline = timeline_of(config, loader.steps_per_epoch)
    total = timeline.total_steps
    found, auto = Found(decision=progress.decision if progress else None), None
    if found.decision is None:
        _tell_of_auto(config)
    if chooses_routing(config):
        window = window_of(config, timeline, loader.steps_per_epoch)
        found = find_before(config, window, progress, context)
        if found.stopped:
            logger.info("stopped while a plain model was probed; run again to begin anew")
            return
        torch.manual_seed(config.seed)
        task = build_task(decided_model(config.model, found.decision), schema)
        auto = AutoRouting(task, config, window, found.decision)
    decision = found.decision
    if decision is not None and decision.route_by is None:
        timeline.leave_out_experts(decision.brought.step if decision.brought else 0)
    assembly = assemble(config, task, context, decided=auto is None or decision is not None)
    start = progress.step if progress else 0
    with ExitStack() as open_until_the_end:
        log = open_until_the_end.enter_context(
            closing(RunLog(folder.path, total, start, enabled=context.is_main))
        )
        saver = checkpoint.Saver(
            folder.checkpoints,
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
            if changes := folder.changes_since(resumed):
                log.say(f"options that are others now: {changes}")
        elif config.init_from is not None:
            with_optimizer = config.train.init_optimizer
            began = warm_start(
                config.init_from,
                assembly.model,
                assembly.optimizers,
                with_optimizer=with_optimizer,
                allow_missing=config.allow_missing,
            )
            trainer.steps_before = began.age
            log.say(began.text())
        if trainer.is_complete and folder.is_tested():
            log.say(f"{folder.path} is complete{trainer.how_to_train_longer()}")
            return
        log.cut_back()
        if found.report is not None and decision is not None:
            log.decided(decision, found.report)
        elif decision is not None:
            log.goes_on(decision)
        folder.write_config()
        folder.write_plan(assembly.plan)
        if not trainer.fit(loader, validation, teacher):
            log.say(
                f"stopped at step {trainer.step} of {total}; {how_to_go_on(config, folder.path)}"
            )
            return
        steps = trainer.step
        tested = trainer.load_best()
        test = trainer.validate("test", test_rows)
    if trainer.decision is not None:
        chosen = decided_model(config.model, tested)
        cost = count_cost(build_task(chosen, schema), schema, config.model.embedding_dim)
    best = best_auc_of(config, "test") if context.is_main else None
    plain = parsed.notes.of_seed(config.seed) if parsed.notes is not None else None
    folder.write_summary(
        {
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
    )
    beside = f" (the best that any model can reach: {best:.4f})" if best is not None else ""
    logger.info("test AUC %.4f%s; written to %s", test.auc, beside, folder.path)
    if trainer.decision is not None:
        for line in found_and_brought(trainer.decision, test.auc, plain, tested=tested):
            logger.info("%s", line)


def _tell_of_auto(config: RunConfig) -> None:
    """Say what the table has counted while nothing is decided."""
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


def _intervals(config: RunConfig) -> Intervals:
    return Intervals(
        log_every=config.train.log_every,
        evaluate_every=config.train.evaluate_every,
        save_every=config.checkpoint.every_steps,
        best=PlateauConfig(metric=config.checkpoint.best) if config.checkpoint.best else None,
        early_stopping=config.train.early_stopping,
    )


def _costs(cost: Cost) -> dict[str, object]:
    return {
        "parameters": dict(cost.parameters),
        "activated_parameters": dict(cost.activated),
        "flops": dict(cost.flops),
        "training_flops": cost.training_flops,
        "lookup_bytes": cost.lookup_bytes,
    }
