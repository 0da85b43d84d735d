"""A plain model, probed: by which features should experts be routed, if at all?

The model is trained for some steps, or taken from a checkpoint, and then stays as it is. Training
rows fit, rows of the validation split judge. Where experts should pay, the model is trained for
longer and probed again, since a young model promises what it will soon learn by itself.
"""

import json
import logging
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchrec.distributed.model_parallel import DistributedModelParallel
from tqdm import tqdm

from torchrec_hilomoe.command_line import parse_saved
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.hilomoe import CannotJudgeError, InteractionProbe, ProbeReport
from torchrec_hilomoe.hilomoe.probe.gathered import ROWS_OF_A_BUCKET
from torchrec_hilomoe.hilomoe.probe.verdict import look_again
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.stopping import StopSignal
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.auto_routing.decision import decided_model, nothing_judged
from torchrec_hilomoe.training.auto_routing.listening import probe_of, run_unchanged
from torchrec_hilomoe.training.checkpoint.state import flatten
from torchrec_hilomoe.training.inputs import (
    loader_of,
    pipelining_of,
    schedule_of,
    schema_of,
    timeline_of,
)
from torchrec_hilomoe.training.non_finite import any_rank, find_non_finite, listed, NonFiniteError
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage, StageTimeline
from torchrec_hilomoe.training.stages.staging import check_stages, enter_stage
from torchrec_hilomoe.training.trainer import training_state

__all__ = ["ProbeOptions", "probe_aside", "probe_run", "route_flags"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Tensors of a run with experts, which its plain model has not, and what only training needs.
NOT_OF_PLAIN = (
    *("model.*.expert_in", "model.*.expert_out", "model.*.expert_keys", "model.*.query_proj"),
    *("optimizer.*", "loss_scale.*"),
)
LISTENING = Stage(name="probe", active_layers=0)  # every map has gradients


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How a model is probed.

    Attributes:
        steps: Steps that a plain model is trained before; a stated age, since gains shrink as a
            model learns.
        later_steps: Steps after which what was found must still pay; not more than ``steps``, and
            with a checkpoint, nobody looks again.
        fit_batches: Batches of training rows that fit.
        judge_batches: Batches of validation rows that judge, at most.
        draws: Draws of keys for each feature.
        checkpoint: A plain model to take instead of training one; None trains.
    """

    steps: int = 300
    later_steps: int = 600
    fit_batches: int = 100
    judge_batches: int = 128
    draws: int = 4
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "later_steps", "fit_batches", "judge_batches", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"probe: --{name} must be at least 1, got {getattr(self, name)}. "
                    f"Leave it out for {getattr(ProbeOptions, name)}."
                )


def probe_run(
    config: RunConfig,
    options: ProbeOptions,
    context: DistributedContext,
    stop: StopSignal | None = None,
) -> ProbeReport:
    """Train a plain model briefly, or load one, and probe it; a collective call.

    Args:
        config: The run; its experts are only thought of.
        options: How to probe.
        context: This process among the ranks.
        stop: Ends it by an error where the ranks are to stop; None lets signals act as they do.

    Raises:
        ValueError: If the configuration, the data or the checkpoint does not fit.
        NonFiniteError: If the plain model breaks in training.
    """
    schema = schema_of(config)
    experts = config.model.hilomoe
    plain = replace(config, model=replace(config.model, hilomoe=replace(experts, enabled=False)))
    torch.manual_seed(config.seed)
    task = build_task(plain.model, schema)
    task.model.backbone.include_history_mean = True
    probe, again = (
        probe_of(task, experts, draws=options.draws, seed=config.seed) for _ in range(2)
    )
    assembly = assemble(plain, task, context, decided=False)
    loader = loader_of(plain, "train", context.world)
    rows = {
        "fit_batches": options.fit_batches * config.train.batch_size,
        "judge_batches": min(
            loader_of(plain, "valid", context.world).rows,
            options.judge_batches * config.train.batch_size,
        ),
    }
    _check_rows(rows, experts.num_experts)
    timeline = timeline_of(plain, loader.steps_per_epoch)
    timeline.leave_out_experts()
    steps, later = (min(it, timeline.total_steps) for it in (options.steps, options.later_steps))
    watchdog = Watchdog(config.stall_seconds, f"rank {context.world.rank}")
    watched = _Watched(watchdog, stop, shown=context.is_main and sys.stderr.isatty())
    with closing(iter(loader)) as batches, watchdog:

        def train(model: DistributedModelParallel, steps: range) -> DistributedModelParallel:
            return _train(plain, assembly, model, batches, timeline, steps, watched)

        def look(probe: InteractionProbe, model: DistributedModelParallel, age: int) -> ProbeReport:
            fitting, most = islice(batches, options.fit_batches), options.judge_batches
            with probe.fit():
                _run(model, watched(fitting, "probe: fit", options.fit_batches))
            with probe.judge():
                judging = islice(loader_of(plain, "valid", context.world), most)
                loss, constant_loss = _run(model, watched(judging, "probe: judge", most))
            return probe.report(loss=loss, constant_loss=constant_loss, steps=age)

        if options.checkpoint is not None:
            steps = _load(options.checkpoint, config, assembly)
            return look(probe, assembly.model, steps)
        check_stages(task, (span.stage for span in timeline.spans))
        model = train(assembly.model, range(steps))
        report = look(probe, model, steps)
        if not report.pays or later <= steps:
            return report
        model = train(model, range(steps, later))
        return look_again(report, look(again, model, later), later)


def probe_aside(config: RunConfig, context: DistributedContext) -> ProbeReport | None:
    """Probe a plain model before a run that asks for it, which stays plain if nothing can be said.

    Args:
        config: The run; ``init_from`` is the plain model, if there is one.
        context: This process among the ranks.

    Returns:
        What was found; None if a signal asked the run to stop.
    """
    options = ProbeOptions(checkpoint=config.init_from)
    with StopSignal() as stop:
        try:
            return probe_run(config, options, context, stop)
        except CannotJudgeError as error:
            return nothing_judged(error)
        except _Stopped:
            return None


class _Stopped(Exception):
    """A signal has asked the ranks to stop."""


class _Watched:
    """Loops whose steps keep a watchdog quiet, ask whether to stop, and move a bar.

    Args:
        watchdog: Of the process.
        stop: Whether the ranks are to stop; None is not asked.
        shown: Whether there is a bar.
    """

    def __init__(self, watchdog: Watchdog, stop: StopSignal | None, *, shown: bool) -> None:
        self._watchdog, self._stop, self._shown = watchdog, stop, shown

    def __call__(self, steps: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Pass steps on; a collective call for each."""
        bar = tqdm(steps, desc=what, total=total, leave=False, disable=not self._shown)
        for step in self._watchdog.over(bar):
            if self._stop is not None and self._stop.requested():
                raise _Stopped
            yield step


def route_flags(config: RunConfig, report: ProbeReport) -> str:
    """Return the options that route a run's experts as a report advises, to be pasted."""
    route_by = json.dumps([list(names) for names in report.route_by], ensure_ascii=False)
    flags = [] if config.model.hilomoe.enabled else ["--model.hilomoe.enabled true"]
    flags += ["--model.hilomoe.routing sample", f"--model.hilomoe.route_by {shlex.quote(route_by)}"]
    return " ".join(flags)


def _check_rows(rows: Mapping[str, int], num_experts: int) -> None:
    """Refuse, before anything is trained, rows that cannot tell of so many experts."""
    least = ROWS_OF_A_BUCKET * num_experts
    for option, found in rows.items():
        if found < least:
            what, more = ("training rows fit", "train.batch_size")
            if option == "judge_batches":
                what, more = ("rows of the validation split judge", "data.eval_rows")
            raise ValueError(
                f"probe: {found:,} {what}, but {num_experts} experts need {least:,}: "
                f"{ROWS_OF_A_BUCKET} each. Give more rows ({more}; of apps/probe.py: "
                f"--{option}), or lower model.hilomoe.num_experts."
            )


def _train(
    config: RunConfig,
    assembly: Assembly,
    model: DistributedModelParallel,
    batches: Iterator[CTRBatch],
    timeline: StageTimeline,
    steps: range,
    watched: _Watched,
) -> DistributedModelParallel:
    """Train for some steps as a run does, and return the model in its wrapper."""
    optimizers, options = assembly.optimizers, pipelining_of(config, schema_of(config))
    loss = math.nan
    for span in timeline.spans:
        inside = range(max(span.start, steps.start), min(span.stop, steps.stop))
        if not inside:
            continue
        model = enter_stage(model, span.stage)
        optimizers.enter(span.stage)
        pipeline = Pipeline(model, optimizers.stage_optimizer, model.device, options)
        ahead = islice(batches, len(inside))
        for step in watched(inside, f"plain model, {span.stage.name}", len(inside)):
            optimizers.set_rates(span, step, timeline.decay(step))
            loss = pipeline.step(ahead).loss
        pipeline.detach()
    _check_finite(float(loss), assembly, steps.stop)
    logger.info(
        "trained a plain model for %d of %d steps, loss %.4f",
        steps.stop,
        timeline.total_steps,
        loss,
    )
    return enter_stage(model, LISTENING)


def _check_finite(loss: float, assembly: Assembly, step: int) -> None:
    """Refuse to probe a model that is broken; a collective call.

    Raises:
        NonFiniteError: The same on every rank.
    """
    state = training_state(assembly.model, assembly.optimizers)
    names = find_non_finite(flatten(state))
    if names or any_rank([] if math.isfinite(loss) else ["the loss"]):
        what = f"{listed(names)} hold values that are no numbers" if names else f"loss is {loss}"
        raise NonFiniteError(
            f"the plain model that is probed broke: after step {step} {what}. Lower "
            "train.learning_rate or train.table_learning_rate, or set train.max_grad_norm."
        )


def _load(path: str, config: RunConfig, assembly: Assembly) -> int:
    """Load a checkpoint, and return the steps that its model was trained for, in all."""
    option = "--init_from" if path == config.init_from else "--checkpoint"
    saved = checkpoint.open(path.rstrip("/"))
    own = parse_saved(saved.document("config.yaml"), [], where=f"{saved.path}/config.yaml").config
    stage, decided = saved.progress.stage, decided_model(own.model, saved.progress.decision)
    if decided.hilomoe.enabled and schedule_of(own).named(stage).active_layers != 0:
        raise ValueError(
            f"probe: {option} {path} is of stage {stage!r}, in which experts compute, and the "
            "probe asks what a model without them cannot express. Give a checkpoint of a plain run "
            f"(--model.hilomoe null) or of stage backbone_warmup, or leave {option} out."
        )
    saved.check_schema(schema_of(config))
    state = training_state(assembly.model, assembly.optimizers)
    allowed = (*NOT_OF_PLAIN, *config.allow_missing)
    saved.load(state, allow_missing=allowed, restore_random=False)
    age = saved.progress.age
    logger.info("loaded %s, a model of %d steps", path, age)
    return age


def _run(model: DistributedModelParallel, batches: Iterable[CTRBatch]) -> tuple[float, float]:
    """Run forward and backward passes that change nothing; a collective call.

    Returns:
        The mean loss, in nats a row, and that of the click rate alone.
    """
    loss_rows_clicks = torch.zeros(3, dtype=torch.float64)
    for output in run_unchanged(model, batches):
        loss_rows_clicks += _sums(output).cpu()
    dist.all_reduce(loss_rows_clicks)
    total, rows, clicks = loss_rows_clicks.tolist()
    rate = clicks / rows if rows else 0.0
    entropy = -math.log(rate) * rate - math.log1p(-rate) * (1 - rate) if 0 < rate < 1 else 0.0
    return total / max(rows, 1.0), entropy


def _sums(output: TaskOutput) -> Tensor:
    """Weighted sums over a batch: of its rows' losses, of ones, of clicks."""
    logits_B, labels_B, weights_B = (
        it.double() for it in (output.logits, output.labels, output.weights)
    )
    loss_B = F.binary_cross_entropy_with_logits(logits_B, labels_B, reduction="none")
    return torch.stack(
        [(weights_B * it).sum() for it in (loss_B, torch.ones_like(loss_B), labels_B)]
    )
