"""The product's training as its trainer steps it, with what it notes of each step."""

import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from benchmarks.driving import ALL, Driven, LONG
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.assemble import Assembly
from torchrec_hilomoe.training.log.run_log import RunLog, StepLog
from torchrec_hilomoe.training.stages import StageSpan

__all__ = ["Trained"]

LOG_EVERY = 50  # the trainer's own habit


class Trained:
    """Rates, a pipelined step, and its metrics, step after step; only the files are left out.

    Args:
        assembly: The model.
        batches: What it trains on, without end.
    """

    def __init__(self, assembly: Assembly, batches: Iterator[CTRBatch]) -> None:
        task = assembly.model.module
        assert isinstance(task, TrainTask)
        self._driven = Driven(assembly, batches)
        self._optimizers = assembly.optimizers
        self._span = StageSpan(stage=ALL, start=0, stop=LONG)
        self._log = StepLog(task, RunLog(Path("unused"), LONG, 0, enabled=False))
        self._steps = 0

    def step(self) -> Tensor:
        """Train one step and return its loss; a collective call."""
        self._optimizers.set_rates(self._span, self._steps, 1.0)
        begin = time.perf_counter()
        output = self._driven.step()
        seconds = time.perf_counter() - begin
        self._steps += 1
        self._log.add(self._steps, ALL.name, output, seconds)
        if self._steps % LOG_EVERY == 0:
            self._log.log_step(self._steps, ALL.name, self._optimizers.rate)
        return output.loss

    def detach(self) -> None:
        """Give the model its own forward back."""
        self._driven.detach()
