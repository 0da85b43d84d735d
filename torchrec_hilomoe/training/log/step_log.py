"""What is told of training steps: a line a window, and what the routers did meanwhile."""

from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.hilomoe.collapse import CollapseWatch
from torchrec_hilomoe.hilomoe.sites import auxiliary_loss
from torchrec_hilomoe.models.train_task import TaskOutput, TrainTask
from torchrec_hilomoe.runtime.memory import peak_memory_gib
from torchrec_hilomoe.training.checkpoint import OpenWindow
from torchrec_hilomoe.training.log.routing import RoutingLog
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.log.window import Window

__all__ = ["StepLog"]


class StepLog:
    """Gathers steps, and writes a line of them when asked to.

    Args:
        task: What is trained.
        log: Where lines go.

    Attributes:
        window: What was trained since the last line.
    """

    def __init__(self, task: TrainTask, log: RunLog) -> None:
        self.window = Window()
        self._task = task
        self._log = log
        # Counts are of all ranks, so one of them is enough to warn.
        first = dist.get_rank() == 0
        self._watch = CollapseWatch(task) if first else None
        self._routing = RoutingLog(task) if first else None
        self._told_step = 0

    def add(self, step: int, stage: str, output: TaskOutput, seconds: float) -> None:
        """Take a step's output, and how long it took."""
        self.window.add(step, output, seconds)
        if self._watch is not None:
            self._watch.observe()
        if self._routing is not None:
            self._routing.observe()
        self._log.step(stage)

    def open_window(self) -> OpenWindow:
        """Return what the next line is to know of the steps so far."""
        counts = {} if self._routing is None else self._routing.counts
        # The counts of one step alone may still be on their way from other ranks: a copy is not.
        choices = {site: found.clone() for site, found in counts.items()}
        return OpenWindow(rows=self.window.rows(), choices=choices)

    def restore(self, found: OpenWindow) -> None:
        """Go on with what :meth:`open_window` gave."""
        self.window.restore(found.rows)
        if self._routing is not None:
            self._routing.restore(found.choices)

    def tell(self, step: int, stage: str, rate: float) -> None:
        """Write a line, unless one of this step was written; a collective call.

        Args:
            step: Steps done.
            stage: The one that trained them.
            rate: The learning rate of the last of them.

        Raises:
            NonFiniteLossError: If one of their losses is no number.
        """
        if self._told_step == step:
            return
        self._told_step = step
        self.window.check_finite()
        speed = self.window.speed(since_start=False)
        self._log.record(
            step=step,
            stage=stage,
            split="train",
            metrics=self.window.metrics(),
            samples_per_second=speed,
            auxiliary_loss=_mean_over_ranks(auxiliary_loss(self._task)),
            learning_rate=rate,
            memory_gib=peak_memory_gib(),
        )
        if self._routing is not None:
            self._log.routing(step, stage, self._routing.flush())


def _mean_over_ranks(part: Tensor) -> float:
    mean = part.detach().double().cpu().reshape(1) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()
