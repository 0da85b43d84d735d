"""The training loop: step, log, evaluate, save, stage by stage."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.hilomoe.inject import expert_names
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.documents import misfit
from torchrec_hilomoe.runtime.stopping import StopSignal
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.auto_routing import AutoRouting
from torchrec_hilomoe.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    RoutingDecision,
    Saver,
)
from torchrec_hilomoe.training.checkpoint.state import flatten
from torchrec_hilomoe.training.log.run_log import RunLog, StepLog
from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.non_finite import find_non_finite, listed, NonFiniteError
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer
from torchrec_hilomoe.training.pipelines.pipeline import evaluate, Pipeline, PipelineOptions
from torchrec_hilomoe.training.stages import PlateauConfig, StageTimeline, StageTimelineState
from torchrec_hilomoe.training.stages.driver import StageDriver
from torchrec_hilomoe.training.stages.metric_tracker import MetricTracker
from torchrec_hilomoe.training.stages.staging import share_statistics
from torchrec_hilomoe.training.teaching import Teacher

__all__ = ["Intervals", "Trainer", "training_state"]


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When the loop does more than train.

    Attributes:
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; None validates at the end only.
        save_every: Steps between two checkpoints; None saves at the end only.
        best: Metric by which the best step is known, which is saved besides.
        early_stopping: Metric that ends the run, in its last stage, when it no longer improves.
    """

    log_every: int
    evaluate_every: int | None
    save_every: int | None
    best: PlateauConfig | None = None
    early_stopping: PlateauConfig | None = None


class _Stopped(Exception):  # noqa: N818
    """All ranks have agreed to stop."""


class Trainer:
    """Trains a sharded model through its stages.

    Args:
        model: The sharded model.
        optimizers: Its optimizers.
        timeline: The stages, on this run.
        intervals: When to log, evaluate and save.
        log: What a person sees.
        saver: Writes the checkpoints.
        watchdog: Ends the process when no step ends.
        pipelining: How steps are driven.
        auto: Finds what routes experts, where the run is to; None leaves the model as it is.

    Raises:
        ValueError: If the model cannot follow a stage.

    Attributes:
        position: Position in the training data, from which it goes on.
        steps_before: Steps that the model had learned for when the run began with it.
        samples_per_second: Rows of all ranks over the seconds spent in training steps.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizers: OptimizersContainer,
        timeline: StageTimeline,
        *,
        intervals: Intervals,
        log: RunLog,
        saver: Saver,
        watchdog: Watchdog | None = None,
        pipelining: PipelineOptions | None = None,
        auto: AutoRouting | None = None,
    ) -> None:
        task = model.module
        assert isinstance(task, TrainTask)
        absent = 0 if auto is None else auto.absent_layers
        self._driver = StageDriver(model, timeline, optimizers, layers_to_come=absent)
        self.position: LoaderState | None = None
        self.steps_before = 0
        self._optimizers = optimizers
        self._timeline = timeline
        self._intervals = intervals
        self._log = log
        self._saver = saver
        self._folders = [saver.folder]  # where checkpoints of this run may be
        self._allow_missing: Sequence[str] = ()
        self._watchdog = watchdog or Watchdog(None)
        self._best = MetricTracker(intervals.best)
        self._stopping = MetricTracker(intervals.early_stopping)
        self._pipelining = pipelining or PipelineOptions()
        self._auto = auto
        self._steps = StepLog(task, log)
        self._pipeline: Pipeline | None = None
        self._ahead: Iterator[CTRBatch] = iter(())
        self._sure = 0  # the step up to which it reads
        self._saved_step: int | None = None
        self._to_validate = False  # the last step's validation was stopped
        self._stop: StopSignal | None = None

    @property
    def model(self) -> DistributedModelParallel:
        """The sharded model under the wrapper of the current stage."""
        return self._driver.model

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self._driver.step

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks over the seconds spent in training steps."""
        return self._steps.window.speed(since_start=True)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self._timeline.total_steps or self._stopping.exhausted

    def how_to_train_longer(self) -> str:
        """Say what lets a run that is complete go on, to follow "is complete"."""
        if self._timeline.spans[-1].stage.name in self._timeline.state.ended:
            return ", since a plateau ended its last stage; give another --out_dir"
        why, option = "", "train.max_steps"
        if self._stopping.exhausted:
            why, option = ", since validations got no better", "train.early_stopping.patience"
        return f"{why}; raise {option}, or give another --out_dir"

    @property
    def decision(self) -> RoutingDecision | None:
        """What was found to route experts, where that is found by the run."""
        return None if self._auto is None else self._auto.decision

    def load(self, saved: Checkpoint, allow_missing: Sequence[str] = ()) -> None:
        """Go on from a checkpoint, but for tensors whose names may differ; a collective call."""
        progress = saved.progress
        self._folders.append(saved.path.rpartition("/")[0] or ".")
        self._allow_missing = allow_missing
        state = training_state(self.model, self._optimizers)
        loaded = saved.load(state, allow_missing=allow_missing)
        self._optimizers.load_state_dict(state)
        if "window" in loaded.rank_state:
            self._steps.load_state_dict(loaded.rank_state)
        if self._auto is not None:
            self._auto.load_state_dict(loaded.rank_state.get("probe", {}), saved)
        self.position, self.steps_before = progress.position, progress.steps_before
        if progress.schedule and (
            problem := misfit(progress.schedule, StageTimelineState, "schedule")
        ):
            raise CheckpointError(f"checkpoint {saved.path} is damaged: {problem}.")
        self._driver.go_on_from(progress.step, progress.schedule)
        if progress.to_validate:
            self._to_validate, self._saved_step = True, progress.step
        self._best.load_state_dict({"best": progress.best})
        self._stopping.load_state_dict({"best": progress.stopping})

    def load_best(self) -> RoutingDecision | None:
        """Go back to the weights of the best validation, to test them; a collective call.

        Returns:
            What had been found to route experts when they were saved.
        """
        best = self._best.best
        if best is None or best.step == self.step:
            return self.decision
        saved = self._checkpoint_of(best.step)
        if saved is None:
            self._log.say(
                f"the best validation, {best.metric} {best.value:.4f} after step {best.step}, was "
                f"not kept; step {self.step} is tested"
            )
            return self.decision
        state, late = training_state(self.model, self._optimizers), list(self._allow_missing)
        if _has_experts(self.decision) and not _has_experts(saved.progress.decision):
            late += [f"model.{name}" for name in expert_names(self.model.module)]
            late.append("optimizer.state.experts*")
        saved.load(state, allow_missing=late, restore_random=False)
        self._driver.compute_as_after(best.step)
        self._log.say(f"testing {saved.path}: {best.metric} {best.value:.4f}, the best validation")
        return saved.progress.decision

    def _checkpoint_of(self, step: int) -> Checkpoint | None:
        """Open the checkpoint of a step, which may be of the run that was gone on with."""
        for folder in self._folders:
            path = checkpoint.find(folder, step)
            if path is not None:
                return checkpoint.open(path)
        return None

    def fit(self, loader: Loader, validation: Loader, teacher: Teacher | None = None) -> bool:
        """Train to the end of the last stage.

        Args:
            loader: Endless, from :attr:`position` on.
            validation: One pass over the validation split.
            teacher: Gives batches the logits that the model learns from, besides their labels.

        Returns:
            Whether the end was reached; False if a signal stopped the run, which is then saved.

        Raises:
            NonFiniteError: With the step, what is no number, and the batch's position.
        """
        # Closed also when an error ends the run: a reader that waits would keep the process alive.
        read = iter(loader)
        if teacher is not None:
            read = teacher.teach(read, self.model.device)
        with closing(read) as batches, self._watchdog, StopSignal() as self._stop:
            reached = self._fit(batches, validation)
            self._stop = None
            self._detach()
            if not reached:
                self.save()
            self._wait_for_saver()
        return reached

    def _fit(self, batches: Iterator[CTRBatch], validation: Loader) -> bool:
        """Return whether the end was reached, and not a signal; a collective call."""
        try:
            if self._to_validate:
                self._evaluate_save(validation)
                self._to_validate = False  # also if it no longer is to
            while not self.is_complete:
                self._ask_to_stop(urgent=self._saver.failed)
                self._read_on(batches, validation)
                self._train()
                if self._due(self._intervals.log_every) or self.step == self._driver.span.stop:
                    self._log_step()
                self._confirm_at_end_of_warmup(validation)
                self._evaluate_save(validation)
        except _Stopped:
            return False
        return True

    def _ask_to_stop(self, *, urgent: bool = False) -> None:
        if self._stop is not None and self._stop.requested(urgent=urgent):
            raise _Stopped

    def _read_on(self, batches: Iterator[CTRBatch], validation: Loader) -> None:
        """Enter the stage of the next step, and let it read batches as far as it surely lasts.

        No batch is read for a step that might belong to another stage.
        """
        if self.step >= self._sure and self._auto is not None and self._auto.is_due(self.step):
            self._decide(self._auto, validation)
        if self._driver.at_boundary:
            self._detach()
        if self._driver.begin_step():
            self._make_pipeline()
        assert self._pipeline is not None
        if self.step >= self._sure:
            self._sure = self._driver.sure_until
            self._ahead = self._driver.take(batches)
            self._pipeline.take(self._ahead)

    def _decide(self, auto: AutoRouting, validation: Loader) -> None:
        """Give the model experts that are routed by what was found to decide, or none."""
        self._detach()
        with closing(iter(validation)) as batches:
            report = auto.decide(self.model, self.step, self._watchdog.over(batches))
        decision = auto.decision
        assert decision is not None
        if decision.route_by is None:
            self._timeline.leave_out_experts()
        else:
            self._optimizers.add_experts(self.model.module)
            self._steps.watch_routers()
        self._log.decided(decision, report)

    @property
    def _confirms(self) -> bool:
        """Whether it is yet to be asked what experts bring."""
        return self._auto is not None and self._auto.may_confirm

    def _confirm_at_end_of_warmup(self, validation: Loader) -> None:
        """Ask what experts brought in their warm-up, and go on without them if it is nothing."""
        if not (self._confirms and self._timeline.ends_expert_warmup(self.step)):
            return
        assert self._auto is not None
        self._detach()
        share_statistics(self.model.module)
        with closing(iter(validation)) as batches:
            decision = self._auto.confirm(self.model, self.step, self._watchdog.over(batches))
        self._driver.train()
        if decision.route_by is None:
            self._timeline.leave_out_experts(self.step)
            self._optimizers.drop_experts()
            self._steps.watch_routers()
        self._log.confirmed(decision)

    def _make_pipeline(self) -> None:
        self._pipeline = Pipeline(
            self.model, self._optimizers.stage_optimizer, self.model.device, self._pipelining
        )
        span = self._driver.span
        self._log.enter(span.stage.name, span.start, span.stop)

    def _train(self) -> None:
        assert self._pipeline is not None
        started = time.perf_counter()
        with self._auto.listening(self.step) if self._auto is not None else nullcontext():
            output = self._pipeline.step(self._ahead)
        seconds = time.perf_counter() - started
        self._driver.end_step()
        self.position = output.position
        self._watchdog.beat()
        norm = self._optimizers.gradient_norm
        self._steps.add(self.step, self._driver.stage.name, output, seconds, norm)

    def _evaluate_save(self, validation: Loader) -> None:
        """Evaluate and save, where it is time to."""
        if self._due(self._intervals.evaluate_every) or self.step == self._timeline.total_steps:
            self._to_validate = True
            metrics = self.validate("valid", validation)
            self._to_validate = False
            if self._driver.observe(asdict(metrics)):
                self._log_step(
                    f"stage {self._driver.stage.name}: a plateau, it ends at step {self.step}"
                )
                self._confirm_at_end_of_warmup(validation)
            self._track_best(metrics)
        if self._due(self._intervals.save_every) or self.is_complete:
            self.save()

    def validate(self, split: str, loader: Loader) -> Metrics:
        """Evaluate in the middle of, or after, training; a collective call."""
        self._detach()
        share_statistics(self.model.module)
        with closing(iter(loader)) as batches:
            metrics = evaluate(self.model, self._optimizers, batches, lambda _: self._go_on())
        self._driver.train()
        if metrics.rows and not math.isfinite(metrics.logloss):
            raise NonFiniteError(
                f"after step {self.step} predictions of the {split} split are no numbers: its "
                f"logloss is {metrics.logloss}. Lower train.learning_rate or "
                "train.table_learning_rate, or set train.max_grad_norm."
            )
        self._log.record(
            step=self.step, stage=self._driver.stage.name, split=split, metrics=metrics
        )
        return metrics

    def _go_on(self) -> None:
        self._watchdog.beat()
        self._ask_to_stop()

    def save(self) -> None:
        """Write a checkpoint, unless one of this step was written; a collective call."""
        if self._saved_step == self.step:
            return
        assert self.position is not None
        self._steps.window.check_finite()
        share_statistics(self.model.module)
        progress = Progress(
            step=self.step,
            stage=self._driver.stage.name,
            position=self.position,
            total_steps=self._timeline.total_steps,
            best=self._best.best,
            stopping=self._stopping.best,
            schedule=self._timeline.state_dict(self.step),
            decision=self.decision,
            to_validate=self._to_validate,
            steps_before=self.steps_before,
        )
        heard = {} if self._auto is None else {"probe": self._auto.state_dict()}
        state = training_state(self.model, self._optimizers)
        self._check_finite(state)
        with self._watchdog.paused():
            self._saver.save(state, progress, rank_state={**self._steps.state_dict(), **heard})
        self._saved_step = self.step

    def _check_finite(self, state: Mapping[str, Any]) -> None:
        """Refuse to save what cannot be trained on, though no loss has shown it yet."""
        if names := find_non_finite(flatten(state)):
            raise NonFiniteError(
                f"after step {self.step} {listed(names)} hold values that are no numbers, so it is "
                "not saved; the last checkpoint is from before. Lower train.learning_rate or "
                "train.table_learning_rate, set train.max_grad_norm, or look at the rows of the "
                f"batch that ends at {self.position}."
            )

    def _track_best(self, metrics: Metrics) -> None:
        """Look whether this step is the best, and whether there is no use in going on."""
        if self.step > self._timeline.spans[-1].start:
            self._stopping.observe(self.step, metrics)
        if self._stopping.exhausted:
            self._log_step(f"no better validation for long enough: stopping at step {self.step}")
        if self._confirms and self._timeline.warms_up_experts(self.step - 1):
            return  # of experts that may be taken out again
        if self._best.observe(self.step, metrics):
            self.save()

    def _wait_for_saver(self) -> None:
        with self._watchdog.paused():
            self._saver.wait()

    def _detach(self) -> None:
        if self._pipeline is not None:
            self._pipeline.detach()

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _log_step(self, remark: str | None = None) -> None:
        self._steps.log_step(self.step, self._driver.stage.name, self._optimizers.rate)
        if remark is not None:
            self._log.say(remark)


def _has_experts(decision: RoutingDecision | None) -> bool:
    return decision is not None and decision.route_by is not None


def training_state(
    model: DistributedModelParallel, optimizers: OptimizersContainer
) -> Mapping[str, Any]:
    """Return every tensor that training changes, by name: views, not copies."""
    return {"model": model.state_dict(), **optimizers.state_dict()}
