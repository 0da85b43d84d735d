"""AUC, GAUC, logloss, normalised entropy and calibration of predictions in memory.

Shape legend:
    N  rows     G  groups
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_hilomoe.training.metrics.pairs import count_pairs

__all__ = ["Metrics", "Sums", "auc", "compute_metrics", "gauc", "logloss"]

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Quality of a set of predictions; NaN where a metric has no value.

    Rows count by their weights everywhere.

    Attributes:
        auc: Share of (clicked, not clicked) pairs in the right order, ties half.
        gauc: AUC inside each group, weighted by the group's rows; one-class groups are skipped.
        logloss: Mean negative log-likelihood, in nats.
        ne: Logloss over that of always predicting the base rate (He et al., 2014).
        rows: How many rows counted.
        calibration: Predicted clicks over clicks: 1 when right on average.
    """

    auc: float
    gauc: float
    logloss: float
    ne: float
    rows: int
    calibration: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What is added up over rows, by weight.

    Attributes:
        rows: Rows.
        weight: Of all of them.
        clicks: Of those that were clicked.
        predicted: Of the clicks that were predicted.
        loss: Negative log-likelihood, in nats.
    """

    rows: float = 0.0
    weight: float = 0.0
    clicks: float = 0.0
    predicted: float = 0.0
    loss: float = 0.0

    @classmethod
    def of(cls, logits_N: Floats, clicked_N: NDArray[np.bool_], weights_N: Floats) -> "Sums":
        """Add up rows."""
        logits_N = logits_N.astype(np.float64)
        weights_N = weights_N.astype(np.float64)
        with np.errstate(invalid="ignore"):  # what is no number stays none
            small_N = np.exp(-np.abs(logits_N))
            loss_N = np.maximum(logits_N, 0.0) + np.log1p(small_N)  # log(1 + exp(z))
            loss_N = loss_N - np.where(clicked_N, logits_N, 0.0)
            chance_N = np.where(logits_N >= 0, 1.0, small_N) / (1.0 + small_N)
        return cls(
            rows=float(len(logits_N)),
            weight=float(weights_N.sum()),
            clicks=float(weights_N[clicked_N].sum()),
            predicted=float((weights_N * chance_N).sum()),
            loss=float((weights_N * loss_N).sum()),
        )

    def metrics(self, *, auc: float, gauc: float) -> Metrics:
        """Finish, with what no sum gives; AUCs of predictions that are no numbers have no value."""
        sound = np.isfinite(self.loss)
        rate = self.clicks / self.weight if self.weight else float("nan")
        mixed = 0 < rate < 1
        base = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if mixed else float("nan")
        loss = self.loss / self.weight if self.weight else float("nan")
        return Metrics(
            auc=auc if sound else float("nan"),
            gauc=gauc if sound else float("nan"),
            logloss=loss,
            ne=float(loss / base),
            rows=int(self.rows),
            calibration=self.predicted / self.clicks if self.clicks else float("nan"),
        )


def auc(scores_N: Floats, labels_N: Floats, weights_N: Floats | None = None) -> float:
    """Return the exact area under the ROC curve; NaN if there is one class only."""
    return gauc(scores_N, labels_N, np.zeros(len(scores_N), dtype=np.int64), weights_N)


def gauc(
    scores_N: Floats,
    labels_N: Floats,
    groups_N: NDArray[np.integer],
    weights_N: Floats | None = None,
) -> float:
    """Return the AUC inside each group, weighted by rows; NaN if no group has both classes."""
    weights_N = _weights(scores_N, weights_N)
    order_N = np.lexsort((scores_N, groups_N))
    signed_N = np.where(labels_N > 0.5, weights_N, -weights_N)[order_N]
    return count_pairs(groups_N[order_N], scores_N[order_N], signed_N).mean_auc()


def logloss(logits_N: Floats, labels_N: Floats, weights_N: Floats | None = None) -> float:
    """Return the mean of ``log(1 + exp(z)) - y z``, in nats; NaN without rows."""
    sums = Sums.of(logits_N, labels_N > 0.5, _weights(logits_N, weights_N))
    return sums.loss / sums.weight if sums.weight else float("nan")


def compute_metrics(
    logits_N: Floats,
    labels_N: Floats,
    groups_N: NDArray[np.integer],
    weights_N: Floats | None = None,
) -> Metrics:
    """Return every metric of one set of predictions."""
    weights_N = _weights(logits_N, weights_N)
    return Sums.of(logits_N, labels_N > 0.5, weights_N).metrics(
        auc=auc(logits_N, labels_N, weights_N), gauc=gauc(logits_N, labels_N, groups_N, weights_N)
    )


def _weights(like_N: Floats, weights_N: Floats | None) -> Floats:
    return np.ones(len(like_N)) if weights_N is None else weights_N
