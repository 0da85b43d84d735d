"""The training loop: step, log, evaluate, save, stage by stage."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch, Position
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.hilomoe.collapse import CollapseWatch
from torchrec_hilomoe.hilomoe.sites import auxiliary_loss
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask
from torchrec_hilomoe.runtime.stopping import StopSignal
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress
from torchrec_hilomoe.training.logging import RunLog
from torchrec_hilomoe.training.metrics import Metrics, Predictions
from torchrec_hilomoe.training.optimizers import decay_factor, Learners
from torchrec_hilomoe.training.pipeline import Pipeline, predict
from torchrec_hilomoe.training.stages import StageSpan
from torchrec_hilomoe.training.staging import (
    check_stages,
    enter_stage,
    set_training_mode,
    share_statistics,
)

__all__ = ["NonFiniteLossError", "Rhythm", "Trainer", "evaluate", "training_state"]


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; nothing was saved since."""


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When the loop does more than train.

    Attributes:
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; None validates at the end only.
        save_every: Steps between two checkpoints; None saves at the end only.
        keep: Checkpoints that stay.
        decay: How the learning rates fall over the run.
    """

    log_every: int
    evaluate_every: int | None
    save_every: int | None
    keep: int
    decay: Literal["constant", "linear", "cosine"]


class Trainer:
    """Trains a sharded model through its stages.

    Args:
        model: The sharded model.
        learners: Its optimizers.
        spans: The stages, placed.
        rhythm: When to log, evaluate and save.
        log: What a person sees.
        folder: Holds the checkpoints.

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
        spans: Sequence[StageSpan],
        *,
        rhythm: Rhythm,
        log: RunLog,
        folder: Path,
    ) -> None:
        task = model.module
        assert isinstance(task, TrainTask)
        check_stages(task, [span.stage for span in spans])
        self.model = model
        self.step = 0
        self.position: Position | None = None
        self._learners = learners
        self._spans = spans
        self._rhythm = rhythm
        self._log = log
        self._folder = folder
        self._total = spans[-1].stop
        self._window = _Window()
        # Counts are of all ranks, so one of them is enough to warn.
        self._watch = CollapseWatch(task) if torch.distributed.get_rank() == 0 else None
        self._span = spans[0]
        self._saved_step: int | None = None
        self._pipeline: Pipeline | None = None

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks over the seconds spent in training steps."""
        return self._window.speed(since_start=True)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; a collective call."""
        progress = checkpoint.read_progress(path)
        checkpoint.load(path, training_state(self.model, self._learners))
        self.step, self.position = progress.step, progress.position
        # The stage that is next, or the last one of a run that is complete.
        ahead = [span for span in self._spans if self.step < span.stop]
        self._span = ahead[0] if ahead else self._spans[-1]

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
        batches = iter(loader)
        with StopSignal() as stop:
            for span in self._spans:
                if span.stop <= self.step:
                    continue
                pipeline = self._enter(span)
                stage_batches = islice(batches, span.stop - self.step)
                while self.step < span.stop:
                    decay = decay_factor(self._rhythm.decay, self.step / self._total)
                    self._learners.set_rates(span, self.step, decay)
                    self._count(pipeline, stage_batches)
                    if self._due(self._rhythm.log_every):
                        self._log_window()
                    if self._due(self._rhythm.evaluate_every) or self.step == self._total:
                        self.validate("valid", validation)
                    if self._due(self._rhythm.save_every) or self.step == self._total:
                        self.save()
                    if stop.requested(self.step):
                        self.save()
                        return False
                pipeline.detach()
        return True

    def validate(self, split: str, loader: Loader) -> Metrics:
        """Evaluate in the middle of, or after, training; a collective call."""
        if self._pipeline is not None:
            self._pipeline.detach()
        share_statistics(self.model.module)
        metrics = evaluate(self.model, self._learners, loader)
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
        path = checkpoint.save(
            self._folder,
            training_state(self.model, self._learners),
            Progress(
                step=self.step,
                stage=self._span.stage.name,
                position=self.position,
                total_steps=self._total,
            ),
            keep=self._rhythm.keep,
        )
        self._saved_step = self.step
        self._log.say(f"saved {path}")

    def _enter(self, span: StageSpan) -> Pipeline:
        self._span = span
        self.model = enter_stage(self.model, span.stage)
        self._learners.enter(span.stage)
        self._pipeline = Pipeline(self.model, self._learners.combined, self.model.device)
        self._log.say(f"stage {span.stage.name}: steps {span.start + 1} to {span.stop}")
        return self._pipeline

    def _count(self, pipeline: Pipeline, batches: Iterator[CTRBatch]) -> None:
        started = time.perf_counter()
        output = pipeline.step(batches)
        self.step += 1
        self.position = output.position
        self._window.add(self.step, output, time.perf_counter() - started)
        if self._watch is not None:
            self._watch.observe()
        self._log.step(self._span.stage.name)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _log_window(self) -> None:
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
        )


def evaluate(model: DistributedModelParallel, learners: Learners, loader: Loader) -> Metrics:
    """Return the metrics of one pass over ``loader``, over all ranks; a collective call.

    The model, detached from a training pipeline, is left in evaluation mode.
    """
    predictions = Predictions()
    for output in predict(model, learners.combined, iter(loader)):
        predictions.add(output.logits, output.labels, output.groups, output.weights)
    return predictions.metrics()


def training_state(model: DistributedModelParallel, learners: Learners) -> Mapping[str, Any]:
    """Return every tensor that training changes, by name: views, not copies."""
    return {"model": model.state_dict(), "optimizer": learners.combined.state_dict()}


def _mean_over_ranks(part: Tensor) -> float:
    mean = part.detach().double().cpu().reshape(1) / torch.distributed.get_world_size()
    torch.distributed.all_reduce(mean)
    return mean.item()


class _Window:
    """What was trained since the last log line, and how fast."""

    def __init__(self) -> None:
        self._predictions = Predictions()
        self._losses: list[tuple[int, TaskOutput]] = []
        self._rows = self._all_rows = 0.0
        self._seconds = self._all_seconds = 0.0

    def add(self, step: int, output: TaskOutput, seconds: float) -> None:
        self._losses.append((step, output))
        self._predictions.add(output.logits, output.labels, output.groups, output.weights)
        self._rows += output.mean_rows * torch.distributed.get_world_size()
        self._seconds += seconds

    def speed(self, *, since_start: bool) -> float:
        rows, seconds = self._rows, self._seconds
        if since_start:
            rows, seconds = rows + self._all_rows, seconds + self._all_seconds
        return rows / seconds if seconds else 0.0

    def check_finite(self) -> None:
        """Stop at the first loss of this rank that is not a number.

        Losses are looked at together, so that a GPU is not waited for at every step.
        """
        if not self._losses:
            return
        finite = torch.stack([output.loss for _, output in self._losses]).isfinite().tolist()
        if all(finite):
            return
        step, output = self._losses[finite.index(False)]
        rank = torch.distributed.get_rank()
        raise NonFiniteLossError(
            f"the loss is {float(output.loss)} at step {step} on rank {rank}, in the batch that "
            f"ends at {output.position}. Lower train.learning_rate or train.table_learning_rate, "
            "or look at the rows there; the last checkpoint is from before."
        )

    def metrics(self) -> Metrics:
        """Return the window's metrics over all ranks, and start a new one."""
        metrics = self._predictions.metrics()
        self._predictions.clear()
        self._losses.clear()
        self._all_rows, self._all_seconds = (
            self._all_rows + self._rows,
            self._all_seconds + self._seconds,
        )
        self._rows, self._seconds = 0.0, 0.0
        return metrics
