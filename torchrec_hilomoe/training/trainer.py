"""The training loop: step, log, evaluate, save, stage by stage."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.hilomoe.collapse import CollapseWatch
from torchrec_hilomoe.hilomoe.sites import auxiliary_loss
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask
from torchrec_hilomoe.runtime.memory import peak_memory_gib
from torchrec_hilomoe.runtime.stopping import StopSignal
from torchrec_hilomoe.runtime.watchdog import Watchdog
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress, Saver
from torchrec_hilomoe.training.log.best import BestWatch
from torchrec_hilomoe.training.log.routing import RoutingLog
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.log.window import Window
from torchrec_hilomoe.training.metrics import Metrics, Predictions
from torchrec_hilomoe.training.optimizers.learners import Learners
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, PipelineOptions, predict
from torchrec_hilomoe.training.stages import Course, Plateau, StageSpan
from torchrec_hilomoe.training.stages.staging import (
    activate_layers,
    check_stages,
    enter_stage,
    set_training_mode,
    share_statistics,
)

__all__ = ["Rhythm", "Trainer", "evaluate", "training_state"]


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
        self._window = Window()
        # Counts are of all ranks, so one of them is enough to warn.
        self._watch = CollapseWatch(task) if torch.distributed.get_rank() == 0 else None
        self._routing = RoutingLog(task) if torch.distributed.get_rank() == 0 else None
        self._span = course.spans[0]
        self._saved_step: int | None = None
        self._logged_step = 0
        self._pipeline: Pipeline | None = None

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks over the seconds spent in training steps."""
        return self._window.speed(since_start=True)

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
            self._window.restore(window)
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
                span = self._course.at(self.step)
                pipeline = self._enter(span)
                while span == self._course.at(self.step) and self.step < span.stop:
                    # No batch is read for a step that might belong to another stage.
                    sure = self._course.sure_until(self.step)
                    ahead = islice(batches, sure - self.step)
                    while self.step < sure:
                        self._learners.set_rates(span, self.step, self._course.decay(self.step))
                        self._count(pipeline, ahead)
                        self._after_step(span, validation)
                        if stop.requested(self.step, urgent=self._saver.failed):
                            self.save()
                            self._wait_for_saver()
                            return False
                        if self._stopping.exhausted:
                            self.save()
                            break
                    if self.is_complete:
                        break
                pipeline.detach()
            self._wait_for_saver()
        return True

    def _after_step(self, span: StageSpan, validation: Loader) -> None:
        if self._due(self._rhythm.log_every) or self.step == span.stop:
            self._log_window()
        if self._due(self._rhythm.evaluate_every) or self.step == self._course.total_steps:
            metrics = self.validate("valid", validation)
            if self._course.observe(self.step, asdict(metrics)):
                self._log_window()
                self._log.say(f"stage {span.stage.name}: a plateau, it ends at step {self.step}")
            self._judge(metrics)
        if self._due(self._rhythm.save_every) or self.step == self._course.total_steps:
            self.save()

    def validate(self, split: str, loader: Loader) -> Metrics:
        """Evaluate in the middle of, or after, training; a collective call."""
        if self._pipeline is not None:
            self._pipeline.detach()
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
        self._window.check_finite()
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
            self._saver.save(state, progress, window=self._window.rows())
        self._saved_step = self.step

    def _judge(self, metrics: Metrics) -> None:
        """Look whether this step is the best, and whether there is no use in going on."""
        if self.step > self._course.spans[-1].start:
            self._stopping.observe(self.step, metrics)
        if self._stopping.exhausted:
            self._log_window()
            self._log.say(f"no better validation for long enough: stopping at step {self.step}")
        if self._best.observe(self.step, metrics):
            self.save()

    def _wait_for_saver(self) -> None:
        with self._watchdog.paused():
            self._saver.wait()

    def _enter(self, span: StageSpan) -> Pipeline:
        self._span = span
        averaged_once = self._pipelining.accumulate == 1
        self.model = enter_stage(self.model, span.stage, static_graph=averaged_once)
        self._learners.enter(span.stage)
        self._pipeline = Pipeline(
            self.model, self._learners.stepping, self.model.device, self._pipelining
        )
        self._log.enter(span.stage.name, span.start, span.stop)
        return self._pipeline

    def _count(self, pipeline: Pipeline, batches: Iterator[CTRBatch]) -> None:
        started = time.perf_counter()
        output = pipeline.step(batches)
        self.step += 1
        self.position = output.position
        self._window.add(self.step, output, time.perf_counter() - started)
        self._watchdog.beat()
        if self._watch is not None:
            self._watch.observe()
        if self._routing is not None:
            self._routing.observe()
        self._log.step(self._span.stage.name)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _log_window(self) -> None:
        if self._logged_step == self.step:
            return
        self._logged_step = self.step
        self._window.check_finite()
        speed = self._window.speed(since_start=False)
        self._log.record(
            step=self.step,
            stage=self._span.stage.name,
            split="train",
            metrics=self._window.metrics(),
            samples_per_second=speed,
            auxiliary_loss=_mean_over_ranks(auxiliary_loss(self.model)),
            learning_rate=self._learners.rate,
            memory_gib=peak_memory_gib(),
        )
        if self._routing is not None:
            self._log.routing(self.step, self._span.stage.name, self._routing.flush())


def evaluate(
    model: DistributedModelParallel,
    learners: Learners,
    batches: Iterable[CTRBatch],
    each: Callable[[TaskOutput], None] = lambda _: None,
) -> Metrics:
    """Return the metrics of ``batches``, over all ranks; a collective call.

    The model, detached from a training pipeline, is left in evaluation mode; ``each`` is called
    with the output of every batch, in their order.
    """
    predictions = Predictions()
    for output in predict(model, learners.combined, iter(batches)):
        predictions.add(output.logits, output.labels, output.groups, output.weights)
        each(output)
    return predictions.metrics()


def training_state(model: DistributedModelParallel, learners: Learners) -> Mapping[str, Any]:
    """Return every tensor that training changes, by name: views, not copies."""
    return {"model": model.state_dict(), **learners.state()}


def _mean_over_ranks(part: Tensor) -> float:
    mean = part.detach().double().cpu().reshape(1) / torch.distributed.get_world_size()
    torch.distributed.all_reduce(mean)
    return mean.item()
