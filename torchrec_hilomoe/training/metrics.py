"""AUC, GAUC, logloss and normalised entropy: exact, over all ranks.

Shape legend:
    N  rows of the whole evaluation
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch import Tensor

__all__ = ["Metrics", "Predictions", "auc", "compute_metrics", "gauc", "logloss"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Quality of a set of predictions; NaN where a metric has no value.

    Attributes:
        auc: Share of (clicked, not clicked) pairs in the right order, ties half.
        gauc: AUC inside each group, weighted by the group's rows; one-class groups are skipped.
        logloss: Mean negative log-likelihood, in nats.
        ne: Logloss over that of always predicting the base rate (He et al., 2014).
        rows: How many rows counted.
    """

    auc: float
    gauc: float
    logloss: float
    ne: float
    rows: int


def auc(scores_N: NDArray[np.floating], labels_N: NDArray[np.floating]) -> float:
    """Return the exact area under the ROC curve; NaN if there is one class only."""
    return gauc(scores_N, labels_N, np.zeros(len(scores_N), dtype=np.int64))


def gauc(
    scores_N: NDArray[np.floating], labels_N: NDArray[np.floating], groups_N: NDArray[np.integer]
) -> float:
    """Return the AUC inside each group, weighted by rows; NaN if no group has both classes."""
    if len(scores_N) == 0:
        return float("nan")
    order_N = np.lexsort((scores_N, groups_N))
    scores_N, groups_N = scores_N[order_N], groups_N[order_N]
    clicked_N = labels_N[order_N] > 0.5
    new_group_N = np.r_[True, groups_N[1:] != groups_N[:-1]]
    new_score_N = new_group_N | np.r_[True, scores_N[1:] != scores_N[:-1]]
    # Tied rows share the mean of the ranks they occupy (Mann-Whitney).
    tie_start = np.flatnonzero(new_score_N)
    tie_size = np.diff(np.r_[tie_start, len(scores_N)])
    rank_N = np.repeat(tie_start + (tie_size - 1) / 2, tie_size)
    group_start = np.flatnonzero(new_group_N)
    rows = np.diff(np.r_[group_start, len(scores_N)]).astype(np.float64)
    positives = np.add.reduceat(clicked_N.astype(np.float64), group_start)
    rank_sum = np.add.reduceat(np.where(clicked_N, rank_N, 0.0), group_start)
    wins = rank_sum - positives * group_start - positives * (positives - 1) / 2
    pairs = positives * (rows - positives)
    mixed = pairs > 0
    if not mixed.any():
        return float("nan")
    return float(np.average(wins[mixed] / pairs[mixed], weights=rows[mixed]))


def logloss(logits_N: NDArray[np.floating], labels_N: NDArray[np.floating]) -> float:
    """Return the mean of ``log(1 + exp(z)) - y z``, in nats; NaN without rows."""
    if len(logits_N) == 0:
        return float("nan")
    logits_N = logits_N.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, logits_N) - labels_N * logits_N))


def compute_metrics(
    logits_N: NDArray[np.floating], labels_N: NDArray[np.floating], groups_N: NDArray[np.integer]
) -> Metrics:
    """Return every metric of one set of predictions."""
    rate = float(np.mean(labels_N)) if len(labels_N) else float("nan")
    loss = logloss(logits_N, labels_N)
    base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) if 0 < rate < 1 else np.nan
    return Metrics(
        auc=auc(logits_N, labels_N),
        gauc=gauc(logits_N, labels_N, groups_N),
        logloss=loss,
        ne=float(loss / base),
        rows=len(logits_N),
    )


class Predictions:
    """Collects a rank's predictions; :meth:`metrics` is computed over every rank's."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, groups: Tensor, weights: Tensor) -> None:
        """Keep the rows whose weight is not 0."""
        counted = weights > 0
        # Words of 64 bits, whatever they mean: a group may be a hash, which no float holds.
        floats = [values.double().view(torch.int64) for values in (logits, labels)]
        self._parts.append(torch.stack([*floats, groups.long()], dim=1)[counted].cpu())

    def clear(self) -> None:
        """Forget everything."""
        self._parts.clear()

    def rows(self) -> Tensor:
        """Return this rank's rows, as :meth:`restore` takes them."""
        return torch.cat(self._parts) if self._parts else torch.empty(0, 3, dtype=torch.int64)

    def restore(self, rows: Tensor) -> None:
        """Take rows that were collected before, on this rank or another."""
        self._parts.append(rows)

    def metrics(self) -> Metrics:
        """Return the metrics over all ranks, the same on each; a collective call."""
        mine = self.rows()
        rows = _gather(mine)
        values = torch.zeros(5, dtype=torch.float64)
        if rows is not None:
            logits, labels, groups = rows.T.contiguous().numpy()
            found = compute_metrics(logits.view(np.float64), labels.view(np.float64), groups)
            values = torch.tensor(
                [found.auc, found.gauc, found.logloss, found.ne, found.rows], dtype=torch.float64
            )
        dist.broadcast(values, src=0)
        auc_, gauc_, loss, ne, count = values.tolist()
        return Metrics(auc=auc_, gauc=gauc_, logloss=loss, ne=ne, rows=int(count))


def _gather(mine: Tensor) -> Tensor | None:
    """Return every rank's rows on rank 0, None elsewhere."""
    size = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(mine)]))
    lengths = [int(count) for count in counts]
    padded = mine.new_zeros(max(lengths), mine.shape[1])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(padded, parts, dst=0)
    if parts is None:
        return None
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
