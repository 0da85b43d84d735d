"""What was trained since the last line of the log: metrics, speed, and that losses are finite."""

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.metrics import Metrics, pack_rows, Predictions
from torchrec_hilomoe.training.non_finite import any_rank, NonFiniteError

__all__ = ["Window"]


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
        self._unchecked: list[tuple[int, TaskOutput, Tensor | None]] = []
        self._rows = self._all_rows = 0.0
        self._seconds = self._all_seconds = 0.0

    def add(
        self,
        step: int,
        output: TaskOutput,
        seconds: float,
        gradient_norm: Tensor | None = None,
    ) -> None:
        """Take a step's output, how long it took, and the norm of its gradients, if it is known."""
        self._unchecked.append((step, output, gradient_norm))
        self._keep(output)  # as it is: it is packed when somebody asks, which is not at every step
        self._rows += output.loss_denominator * dist.get_world_size()
        self._seconds += seconds

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's predictions, to be saved with a checkpoint."""
        return {"window": self._rows_kept()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on with what :meth:`state_dict` gave, on this rank or another."""
        self._keep(state_dict["window"])

    def _rows_kept(self) -> Tensor:
        parts = [it if isinstance(it, Tensor) else _pack(it) for it in self._kept]
        return torch.cat([EMPTY, *(part.cpu() for part in parts)])[-METRIC_ROWS:]

    def speed(self, *, since_start: bool) -> float:
        """Return rows of all ranks per second of training steps."""
        rows, seconds = self._rows, self._seconds
        if since_start:
            rows, seconds = rows + self._all_rows, seconds + self._all_seconds
        return rows / seconds if seconds else 0.0

    def check_finite(self) -> None:
        """Stop all ranks at the first loss, or norm, of any of them that is no number; collective.

        They are looked at together, so that a GPU is not waited for at every step.

        Raises:
            NonFiniteError: The same on every rank.
        """
        if found := any_rank(self._non_finite()):
            raise NonFiniteError(
                f"{'; '.join(found)}. Lower train.learning_rate or "
                "train.table_learning_rate, or look at the rows there; the last checkpoint is "
                "from before."
            )
        self._unchecked.clear()

    def metrics(self) -> Metrics:
        """Return the window's metrics over all ranks, and start a new one; collective."""
        predictions = Predictions()
        predictions.add_packed(self._rows_kept())
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

    def _non_finite(self) -> list[str]:
        if not self._unchecked:
            return []
        losses = torch.stack([output.loss for _, output, _ in self._unchecked])
        norms = [losses.new_zeros(()) if norm is None else norm for _, _, norm in self._unchecked]
        both = torch.stack([losses, torch.stack(norms).to(losses)]).tolist()
        for (step, output, _), loss, norm in zip(self._unchecked, *both, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the gradients' norm is {norm}" if math.isfinite(loss) else None
                return [
                    f"{what or f'the loss is {loss}'} at step {step} on rank {dist.get_rank()}, in "
                    f"the batch that ends at {output.position}"
                ]
        return []


def _count(rows: Tensor | TaskOutput) -> int:
    return len(rows if isinstance(rows, Tensor) else rows.labels)


def _pack(output: TaskOutput) -> Tensor:
    return pack_rows(output.logits, output.labels, output.grouping_keys, output.weights)
