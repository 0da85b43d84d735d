"""What was trained since the last line of the log: metrics, speed, and that losses are finite."""

from collections import deque

import torch
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.metrics import Metrics, pack_rows, Predictions

__all__ = ["NonFiniteLossError", "Window"]


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; nothing was saved since."""


# Of a rank. More would not make a line of the log more telling, but slow down large batches.
METRIC_ROWS = 2**16
EMPTY = torch.zeros(0, 2, dtype=torch.int64)


class Window:
    """Gathers steps until the next line of the log.

    Its metrics are of the last :data:`METRIC_ROWS` rows of each rank: all of them, unless batches
    are large or lines are rare. Whether they came by steps or from a checkpoint plays no part.
    """

    def __init__(self) -> None:
        self._kept: deque[Tensor | TaskOutput] = deque()
        self._kept_rows = 0
        self._losses: list[tuple[int, TaskOutput]] = []
        self._rows = self._all_rows = 0.0
        self._seconds = self._all_seconds = 0.0

    def add(self, step: int, output: TaskOutput, seconds: float) -> None:
        """Take a step's output, and how long it took."""
        self._losses.append((step, output))
        self._keep(output)  # as it is: it is packed when somebody asks, which is not at every step
        self._rows += output.mean_rows * dist.get_world_size()
        self._seconds += seconds

    def rows(self) -> Tensor:
        """Return this rank's predictions, to be saved with a checkpoint."""
        parts = [it if isinstance(it, Tensor) else _pack(it) for it in self._kept]
        return torch.cat([EMPTY, *(part.cpu() for part in parts)])[-METRIC_ROWS:]

    def restore(self, rows: Tensor) -> None:
        """Go on with what :meth:`rows` gave, on this rank or another."""
        self._keep(rows)

    def speed(self, *, since_start: bool) -> float:
        """Return rows of all ranks per second of training steps."""
        rows, seconds = self._rows, self._seconds
        if since_start:
            rows, seconds = rows + self._all_rows, seconds + self._all_seconds
        return rows / seconds if seconds else 0.0

    def check_finite(self) -> None:
        """Stop all ranks at the first loss of any of them that is not a number; collective.

        Losses are looked at together, so that a GPU is not waited for at every step.

        Raises:
            NonFiniteLossError: The same on every rank.
        """
        found: list[str | None] = [None] * dist.get_world_size()
        mine = self._non_finite()
        bad = torch.tensor([int(mine is not None)])
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():
            dist.all_gather_object(found, mine)
            raise NonFiniteLossError(
                f"{'; '.join(text for text in found if text)}. Lower train.learning_rate or "
                "train.table_learning_rate, or look at the rows there; the last checkpoint is "
                "from before."
            )
        self._losses.clear()

    def metrics(self) -> Metrics:
        """Return the window's metrics over all ranks, and start a new one; collective."""
        predictions = Predictions()
        predictions.restore(self.rows())
        metrics = predictions.metrics()
        self._kept.clear()
        self._kept_rows = 0
        self._all_rows, self._all_seconds = (
            self._all_rows + self._rows,
            self._all_seconds + self._seconds,
        )
        self._rows, self._seconds = 0.0, 0.0
        return metrics

    def _keep(self, rows: Tensor | TaskOutput) -> None:
        self._kept.append(rows)
        self._kept_rows += _count(rows)
        while self._kept_rows - _count(self._kept[0]) >= METRIC_ROWS:
            self._kept_rows -= _count(self._kept.popleft())

    def _non_finite(self) -> str | None:
        if not self._losses:
            return None
        finite = torch.stack([output.loss for _, output in self._losses]).isfinite().tolist()
        if all(finite):
            return None
        step, output = self._losses[finite.index(False)]
        return (
            f"the loss is {float(output.loss)} at step {step} on rank {dist.get_rank()}, in the "
            f"batch that ends at {output.position}"
        )


def _count(rows: Tensor | TaskOutput) -> int:
    return len(rows if isinstance(rows, Tensor) else rows.labels)


def _pack(output: TaskOutput) -> Tensor:
    return pack_rows(output.logits, output.labels, output.groups, output.weights)
