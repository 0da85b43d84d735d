"""AUC, GAUC, logloss, normalised entropy and calibration of predictions in memory.

An AUC is a count of pairs in the right order. Of two stretches of sorted rows of one group, the
joint count is that of each, plus every clicked row of the later one against every unclicked row of
the earlier one. So a group may be cut anywhere, counted in pieces, and joined exactly.

Shape legend:
    N  rows, sorted by group and then by score where they are counted
    T  ties: rows of equal group and score     G  groups, or stretches of one
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchrec_hilomoe.data.synthetic.source import PROBABILITY, SyntheticSource

__all__ = [
    "Metrics",
    "Pairs",
    "Sums",
    "auc",
    "best_auc",
    "compute_metrics",
    "count_pairs",
    "gauc",
    "logloss",
]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Counts of stretches of groups, in order.

    Attributes:
        groups: ``(G,)``, ascending; equal neighbours are stretches of one group.
        positive: ``(G,)`` weight of clicked rows.
        negative: ``(G,)`` weight of the others.
        wins: ``(G,)`` weight of pairs in the right order, ties half.
    """

    groups: NDArray[np.int64]
    positive: NDArray[np.float64]
    negative: NDArray[np.float64]
    wins: NDArray[np.float64]

    @classmethod
    def concatenated(cls, parts: "list[Pairs]") -> "Pairs":
        """Put stretches one after the other."""
        if not parts:
            nothing = np.zeros(0)
            return cls(
                groups=nothing.astype(np.int64), positive=nothing, negative=nothing, wins=nothing
            )
        return cls(
            groups=np.concatenate([part.groups for part in parts]),
            positive=np.concatenate([part.positive for part in parts]),
            negative=np.concatenate([part.negative for part in parts]),
            wins=np.concatenate([part.wins for part in parts]),
        )

    def joined(self) -> "Pairs":
        """Join the stretches of each group: every group then occurs once."""
        if len(self.groups) == 0:
            return self
        first_G = np.flatnonzero(_changes(self.groups))
        before_G = _sums_before(self.negative, first_G)
        return Pairs(
            groups=self.groups[first_G],
            positive=np.add.reduceat(self.positive, first_G),
            negative=np.add.reduceat(self.negative, first_G),
            wins=np.add.reduceat(self.wins + self.positive * before_G, first_G),
        )

    def ends(self) -> "Pairs":
        """The first stretch and the last, whose groups may go on elsewhere."""
        return self._take(sorted({0, len(self.groups) - 1} if len(self.groups) else set()))

    def inner(self) -> "Pairs":
        """All the others, whose groups are complete."""
        return self._take(range(1, len(self.groups) - 1))

    def aucs(self) -> NDArray[np.float64]:
        """Of each group; NaN where it has one class only."""
        pairs_G = self.positive * self.negative
        return np.divide(self.wins, pairs_G, out=np.full(len(pairs_G), np.nan), where=pairs_G > 0)

    def weighted_sum(self) -> NDArray[np.float64]:
        """AUCs by weight, and that weight, of the groups with both classes."""
        aucs_G = self.aucs()
        mixed_G = ~np.isnan(aucs_G)
        weights_G = (self.positive + self.negative)[mixed_G]
        return np.array([(aucs_G[mixed_G] * weights_G).sum(), weights_G.sum()])

    def mean_auc(self) -> float:
        """AUC inside each group, weighted; NaN if no group has both classes."""
        total, weight = self.joined().weighted_sum()
        return float(total / weight) if weight else float("nan")

    def _take(self, index: "list[int] | range") -> "Pairs":
        chosen = np.array(index, dtype=np.int64)
        return Pairs(
            groups=self.groups[chosen],
            positive=self.positive[chosen],
            negative=self.negative[chosen],
            wins=self.wins[chosen],
        )


def count_pairs(
    groups_N: NDArray[np.integer], scores_N: NDArray[np.floating], signed_N: NDArray[np.floating]
) -> Pairs:
    """Count the pairs of sorted rows.

    Args:
        groups_N: Ascending.
        scores_N: Ascending inside each group.
        signed_N: Weight of each row, negative where it was not clicked.
    """
    if len(groups_N) == 0:
        return Pairs.concatenated([])
    signed_N = signed_N.astype(np.float64)
    new_group_N = _changes(groups_N)
    tie_T = np.flatnonzero(new_group_N | _changes(scores_N))
    positive_T = np.add.reduceat(np.maximum(signed_N, 0.0), tie_T)
    negative_T = np.add.reduceat(np.maximum(-signed_N, 0.0), tie_T)
    first_G = np.flatnonzero(new_group_N[tie_T])
    wins_T = positive_T * (_sums_before(negative_T, first_G) + negative_T / 2)
    return Pairs(
        groups=groups_N[tie_T[first_G]].astype(np.int64),
        positive=np.add.reduceat(positive_T, first_G),
        negative=np.add.reduceat(negative_T, first_G),
        wins=np.add.reduceat(wins_T, first_G),
    )


def _changes(values_N: NDArray) -> NDArray[np.bool_]:
    """Where a value differs from the one before; always at the first."""
    changes_N = np.ones(len(values_N), dtype=np.bool_)
    np.not_equal(values_N[1:], values_N[:-1], out=changes_N[1:])
    return changes_N


def _sums_before(
    values_N: NDArray[np.float64], first_G: NDArray[np.integer]
) -> NDArray[np.float64]:
    """For each value, the sum of those before it in its stretch."""
    before_N = np.cumsum(values_N) - values_N
    lengths_G = np.diff(np.append(first_G, len(values_N)))
    return before_N - np.repeat(before_N[first_G], lengths_G)


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
        rows: Number of rows that count.
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
        weight: Sum of the weights of all rows.
        clicks: Sum of the weights of the rows that were clicked.
        predicted: Sum of the predicted clicks, weighted.
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


def best_auc(source: SyntheticSource) -> float:
    """AUC of the true probabilities on epoch 0 of ``source``.

    Reads the whole epoch, and keeps two numbers a row.
    """
    tables = [
        source.read(epoch=0, block=block).select([PROBABILITY, source.schema.label])
        for block in range(len(source.block_rows))
    ]
    table = pa.concat_tables(tables)
    return auc(table[PROBABILITY].to_numpy(), table[source.schema.label].to_numpy())
