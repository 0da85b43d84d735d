"""The training loop: step, log, evaluate, save, stage by stage."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.stopping import StopSignal
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress, Saver
from torchrec_hilomoe.training.log.best import BestWatch
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.log.step_log import StepLog
from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.optimizers.learners import Learners
from torchrec_hilomoe.training.pipelines.evaluate import evaluate
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, PipelineOptions
from torchrec_hilomoe.training.stages import Course, Plateau, StageSpan
from torchrec_hilomoe.training.stages.staging import (
    activate_layers,
    check_stages,
    enter_stage,
    set_training_mode,
    share_statistics,
)

__all__ = ["Rhythm", "Trainer", "training_state"]


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When the loop does more than train.

    Attributes:
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; None validates at the end only.
        save_every: Steps between two checkpoints; None saves at the end only.
        best: By what the best step is known, which is saved besides.
        early_stopping: Ends the run, in its last stage, when it no longer improves.
    """

    log_every: int
    evaluate_every: int | None
    save_every: int | None
    best: Plateau | None = None
    early_stopping: Plateau | None = None


class Trainer:
    """Trains a sharded model through its stages.

    Args:
        model: The sharded model.
        learners: Its optimizers.
        course: The stages, on this run.
        rhythm: When to log, evaluate and save.
        log: What a person sees.
        saver: Writes the checkpoints.
        watchdog: Ends the process when no step ends.
        pipelining: How steps are driven.

    Raises:
        ValueError: If the model cannot follow a stage.

    Attributes:
        model: The sharded model under the wrapper of the current stage.
        step: Optimizer steps done.
        position: Where the data goes on.
        samples_per_second: Rows of all ranks over the seconds spent in training steps.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        learners: Learners,
        course: Course,
        *,
        rhythm: Rhythm,
        log: RunLog,
        saver: Saver,
        watchdog: Watchdog | None = None,
        pipelining: PipelineOptions | None = None,
    ) -> None:
        task = model.module
        assert isinstance(task, TrainTask)
        check_stages(task, [span.stage for span in course.spans])
        self.model = model
        self.step = 0
        self.position: Position | None = None
        self._learners = learners
        self._course = course
        self._rhythm = rhythm
        self._log = log
        self._saver = saver
        self._watchdog = watchdog or Watchdog(None)
        self._best = BestWatch(rhythm.best)
        self._stopping = BestWatch(rhythm.early_stopping)
        self._pipelining = pipelining or PipelineOptions()
        self._steps = StepLog(task, log)
        self._span = course.spans[0]
        self._pipeline: Pipeline | None = None
        self._ahead: Iterator[CTRBatch] = iter(())
        self._sure = 0  # the step up to which it reads
        self._saved_step: int | None = None

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks over the seconds spent in training steps."""
        return self._steps.window.speed(since_start=True)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self._course.total_steps or self._stopping.exhausted

    def restore(self, path: str, allow_missing: Sequence[str] = ()) -> None:
        """Go on from a checkpoint, but for tensors whose names may differ; a collective call."""
        progress = checkpoint.read_progress(path)
        state = training_state(self.model, self._learners)
        window = checkpoint.load(path, state, allow_missing=allow_missing)
        if window is not None:
            self._steps.restore(window)
        self.step, self.position = progress.step, progress.position
        self._learners.restored()
        if progress.schedule:
            self._course.restore(progress.schedule)
        self._best.restore(progress.best)
        self._stopping.restore(progress.stopping)
        self._span = self._course.at(self.step)

    def restore_best(self) -> None:
        """Go back to the weights of the best validation, to test them; a collective call."""
        best = self._best.best
        if best is None or best.step == self.step:
            return
        path = self._saver.path_of(best.step)
        state = training_state(self.model, self._learners)
        checkpoint.load(path, state, restore_random=False)
        self.step = best.step
        self._span = self._course.at(best.step - 1)
        activate_layers(self.model.module, self._span.stage)
        self._log.say(f"testing {path}: {best.metric} {best.value:.4f}, the best validation")

    def fit(self, loader: Loader, validation: Loader) -> bool:
        """Train to the end of the last stage.

        Args:
            loader: Endless, from :attr:`position` on.
            validation: One pass over the validation split.

        Returns:
            Whether the end was reached; False if a signal stopped the run, which is then saved.

        Raises:
            NonFiniteLossError: With the step, the rank and the batch's position.
        """
        # Closed also when an error ends the run: a reader that waits would keep the process alive.
        with closing(iter(loader)) as batches, StopSignal() as stop, self._watchdog:
            while not self.is_complete:
                self._read_on(batches)
                self._train()
                self._look_around(validation)
                if stop.requested(self.step, urgent=self._saver.failed):
                    self.save()
                    self._wait_for_saver()
                    return False
            self._detach()
            self._wait_for_saver()
        return True

    def _read_on(self, batches: Iterator[CTRBatch]) -> None:
        """Enter the stage of the next step, and let it read batches as far as it surely lasts.

        No batch is read for a step that might belong to another stage.
        """
        if self.step < self._sure:
            return
        span = self._course.at(self.step)
        if self._pipeline is None or span != self._span:
            self._enter(span)
        self._sure = self._course.sure_until(self.step)
        self._ahead = islice(batches, self._sure - self.step)

    def _enter(self, span: StageSpan) -> None:
        self._detach()
        self._span = span
        averaged_once = self._pipelining.accumulate == 1
        self.model = enter_stage(self.model, span.stage, static_graph=averaged_once)
        self._learners.enter(span.stage)
        self._pipeline = Pipeline(
            self.model, self._learners.stepping, self.model.device, self._pipelining
        )
        self._log.enter(span.stage.name, span.start, span.stop)

    def _train(self) -> None:
        assert self._pipeline is not None
        self._learners.set_rates(self._span, self.step, self._course.decay(self.step))
        started = time.perf_counter()
        output = self._pipeline.step(self._ahead)
        seconds = time.perf_counter() - started
        self.step += 1
        self.position = output.position
        self._watchdog.beat()
        self._steps.add(self.step, self._span.stage.name, output, seconds)

    def _look_around(self, validation: Loader) -> None:
        """Log, evaluate and save, where it is time to."""
        if self._due(self._rhythm.log_every) or self.step == self._span.stop:
            self._tell()
        if self._due(self._rhythm.evaluate_every) or self.step == self._course.total_steps:
            metrics = self.validate("valid", validation)
            if self._course.observe(self.step, asdict(metrics)):
                self._tell(f"stage {self._span.stage.name}: a plateau, it ends at step {self.step}")
            self._judge(metrics)
        if self._due(self._rhythm.save_every) or self.is_complete:
            self.save()

    def validate(self, split: str, loader: Loader) -> Metrics:
        """Evaluate in the middle of, or after, training; a collective call."""
        self._detach()
        share_statistics(self.model.module)
        metrics = evaluate(self.model, self._learners, loader, lambda _: self._watchdog.beat())
        set_training_mode(self.model, self._span.stage)
        self._log.record(step=self.step, stage=self._span.stage.name, split=split, metrics=metrics)
        return metrics

    def save(self) -> None:
        """Write a checkpoint, unless one of this step was written; a collective call."""
        if self._saved_step == self.step:
            return
        assert self.position is not None
        self._steps.window.check_finite()
        share_statistics(self.model.module)
        progress = Progress(
            step=self.step,
            stage=self._span.stage.name,
            position=self.position,
            total_steps=self._course.total_steps,
            best=self._best.best,
            stopping=self._stopping.best,
            schedule=self._course.saved(),
        )
        with self._watchdog.paused():
            state = training_state(self.model, self._learners)
            self._saver.save(state, progress, window=self._steps.open_window())
        self._saved_step = self.step

    def _judge(self, metrics: Metrics) -> None:
        """Look whether this step is the best, and whether there is no use in going on."""
        if self.step > self._course.spans[-1].start:
            self._stopping.observe(self.step, metrics)
        if self._stopping.exhausted:
            self._tell(f"no better validation for long enough: stopping at step {self.step}")
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

    def _tell(self, remark: str | None = None) -> None:
        self._steps.tell(self.step, self._span.stage.name, self._learners.rate)
        if remark is not None:
            self._log.say(remark)


def training_state(model: DistributedModelParallel, learners: Learners) -> Mapping[str, Any]:
    """Return every tensor that training changes, by name: views, not copies."""
    return {"model": model.state_dict(), **learners.state()}
