"""Predictions of all ranks, collected in bounded memory, and their exact metrics.

Shape legend:
    N  rows of a batch, or of everything collected
"""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.training.metrics.definitions import Metrics, Pairs, Sums
from torchrec_hilomoe.training.metrics.over_ranks import count_over_ranks
from torchrec_hilomoe.training.metrics.sorted_runs import PredictionColumns, SortedRuns

__all__ = ["CAPACITY", "Predictions", "SlicedPredictions", "TooManySlicesError", "pack_rows"]

# Rows that a rank holds in memory, at 16 bytes; more go to temporary files.
CAPACITY = 2**22
# Batches are copied to the host together, so that a GPU is not waited for at every step.
WAITING = 2**18
MAX_SLICES = 10_000


class TooManySlicesError(ValueError):
    """A feature has more values than metrics can be kept of."""


def pack_rows(logits: Tensor, labels: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Return a batch as :meth:`Predictions.add_packed` takes it: ``(N, 2)`` int64, where it is."""
    signed = torch.where(labels > 0.5, weights, -weights)
    numbers = torch.stack([logits.float(), signed.float()], dim=1).view(torch.int64)
    return torch.cat([groups.long()[:, None], numbers], dim=1)


class _Collected:
    """Rows of this rank, in words of 64 bits: a group, and two float32.

    A group may be a hash, which no float holds.
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, logits: Tensor, labels: Tensor, groups: Tensor, weights: Tensor) -> bool:
        """Keep rows; return whether it is time to take them."""
        return self.put(pack_rows(logits, labels, groups, weights))

    def put(self, rows: Tensor) -> bool:
        self._waiting.append(rows)
        self._waiting_rows += len(rows)
        return self._waiting_rows > WAITING

    def take(self) -> PredictionColumns:
        """Remove them."""
        rows = self.rows()
        self.clear()
        numbers = rows[:, 1:].contiguous().view(torch.float32).numpy()
        return PredictionColumns(
            groups=rows[:, 0].contiguous().numpy(),
            scores=numbers[:, 0].copy(),
            signed=numbers[:, 1].astype(np.float64),
        )

    def rows(self) -> Tensor:
        """Those that count, on the host."""
        if not self._waiting:
            return torch.zeros(0, 2, dtype=torch.int64)
        rows = torch.cat([part.cpu() for part in self._waiting])
        rows = rows[rows[:, 1:].contiguous().view(torch.float32)[:, 1] != 0]
        self._waiting = [rows]
        return rows

    def clear(self) -> None:
        self._waiting.clear()
        self._waiting_rows = 0


class Predictions:
    """Collects a rank's predictions; :meth:`metrics` is computed over every rank's.

    Metrics are exact for any number of rows: beyond ``capacity`` they are sorted on disk.

    Args:
        capacity: Rows that are held in memory.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._collected = _Collected()
        self._sums = Sums()
        self._by_score = SortedRuns(capacity)
        self._by_group = SortedRuns(capacity)

    def add(self, logits: Tensor, labels: Tensor, groups: Tensor, weights: Tensor) -> None:
        """Keep the rows whose weight is not 0."""
        if self._collected.add(logits, labels, groups, weights):
            self._digest()

    def clear(self) -> None:
        """Forget everything."""
        self._collected.clear()
        self._sums = Sums()
        self._by_score.clear()
        self._by_group.clear()

    def rows(self) -> Tensor:
        """Return this rank's rows, as :meth:`add_packed` takes them."""
        if self._by_group.rows == 0:
            return self._collected.rows()
        self._digest()
        return _packed(PredictionColumns.concatenated(self._by_group.runs()))

    def add_packed(self, rows: Tensor) -> None:
        """Keep rows that were collected before, on this rank or another."""
        self._collected.put(rows)

    def metrics(self) -> Metrics:
        """Return the metrics over all ranks, the same on each; a collective call."""
        self._digest()
        sums = _sum_over_ranks(self._sums)
        auc = count_over_ranks(self._by_score, self._capacity, _nothing).rest.mean_auc()
        grouped = count_over_ranks(self._by_group, self._capacity, Pairs.weighted_sum)
        total, weight = grouped.total + grouped.rest.weighted_sum()
        return sums.metrics(auc=auc, gauc=float(total / weight) if weight else float("nan"))

    def _digest(self) -> None:
        columns = self._collected.take()
        here = Sums.of(columns.scores, columns.signed > 0, np.abs(columns.signed))
        self._sums = _added(self._sums, here)
        one_group = np.zeros(len(columns), dtype=np.int64)
        self._by_score.add(
            PredictionColumns(groups=one_group, scores=columns.scores, signed=columns.signed)
        )
        self._by_group.add(columns)


class SlicedPredictions:
    """The same, for each value of a feature.

    Args:
        feature: Its name, for messages.
        capacity: Rows that are held in memory.
    """

    def __init__(self, feature: str, capacity: int = CAPACITY) -> None:
        self._feature = feature
        self._capacity = capacity
        self._collected = _Collected()
        self._sums: dict[int, Sums] = {}
        self._sorted = SortedRuns(capacity)

    def add(self, logits: Tensor, labels: Tensor, values: Tensor, weights: Tensor) -> None:
        """Keep the rows whose weight is not 0.

        Raises:
            TooManySlicesError: If the feature has too many values.
        """
        if self._collected.add(logits, labels, values, weights):
            self._digest()

    def metrics(self) -> Mapping[int, Metrics]:
        """Return each value's metrics over all ranks, the largest first; a collective call.

        Raises:
            TooManySlicesError: If the feature has too many values.
        """
        self._digest()
        parts: list[dict[int, Sums]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, self._sums)
        sums: dict[int, Sums] = {}
        for part in parts:
            for value, found in part.items():
                sums[value] = _added(sums.get(value, Sums()), found)
        self._check(len(sums))
        slots = {value: at for at, value in enumerate(sorted(sums))}

        def spread(pairs: Pairs) -> NDArray[np.float64]:
            table = np.full(len(slots), 0.0)
            # Zero stands for "not here", so an AUC is told by 1 + itself.
            table[[slots[value] for value in pairs.groups.tolist()]] = 1 + pairs.aucs()
            return table

        counted = count_over_ranks(self._sorted, self._capacity, spread)
        aucs = counted.total + spread(counted.rest) - 1
        nan = float("nan")
        found = {
            value: sums[value].metrics(auc=float(aucs[at]), gauc=nan) for value, at in slots.items()
        }
        return dict(sorted(found.items(), key=lambda item: (-item[1].rows, item[0])))

    def _digest(self) -> None:
        columns = self._collected.take()
        values, where_N = np.unique(columns.groups, return_inverse=True)
        self._check(len(self._sums.keys() | set(values.tolist())))
        order_N = np.argsort(where_N, kind="stable")
        borders = np.searchsorted(where_N[order_N], np.arange(len(values) + 1))
        for at, value in enumerate(values.tolist()):
            rows = order_N[borders[at] : borders[at + 1]]
            signed = columns.signed[rows]
            here = Sums.of(columns.scores[rows], signed > 0, np.abs(signed))
            self._sums[value] = _added(self._sums.get(value, Sums()), here)
        self._sorted.add(columns)

    def _check(self, count: int) -> None:
        if count > MAX_SLICES:
            raise TooManySlicesError(
                f"slice: {self._feature!r} has more than {MAX_SLICES} values here, too many for "
                "metrics of each. Slice by a coarser feature."
            )


def _packed(columns: PredictionColumns) -> Tensor:
    """Rows as :class:`_Collected` holds them."""
    numbers = np.stack([columns.scores, columns.signed.astype(np.float32)], axis=1)
    words = [columns.groups[:, None], np.ascontiguousarray(numbers).view(np.int64)]
    return torch.from_numpy(np.concatenate(words, axis=1))


def _nothing(pairs: Pairs) -> NDArray[np.float64]:
    return np.zeros(0)


def _added(one: Sums, other: Sums) -> Sums:
    pairs = zip(asdict(one).items(), asdict(other).values(), strict=True)
    return Sums(**{name: value + more for (name, value), more in pairs})


def _sum_over_ranks(sums: Sums) -> Sums:
    values = torch.tensor(list(asdict(sums).values()), dtype=torch.float64)
    dist.all_reduce(values)
    return Sums(**dict(zip(asdict(sums), values.tolist(), strict=True)))
