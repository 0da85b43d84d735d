"""Pairs in the right order, counted from sorted rows, in pieces that can be joined.

An AUC is a count of pairs. Of two stretches of sorted rows of one group, the joint count is that of
each, plus every clicked row of the later one against every unclicked row of the earlier one. So a
group may be cut anywhere, counted in pieces, and joined exactly.

Shape legend:
    N  rows, sorted by group and then by score     T  ties: rows of equal group and score
    G  groups, or stretches of one
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pairs", "count_pairs"]


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
