"""Visits: a user with a history, an hour, a candidate and its dense features.

Shape legend:
    B  visits
    T  longest possible history, ``MAX_HISTORY``
    F  dense features
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_hilomoe.data.synthetic.population import (
    BRANCHES,
    GROUPS,
    HOURS,
    Ints,
    LEAF_ITEMS,
    Population,
    USERS,
)

__all__ = ["DENSE", "MAX_HISTORY", "Sessions"]

DENSE = 8
MAX_HISTORY = 12
MIN_HISTORY = 3
EMPTY_SHARE = 0.02

# How often an event stays with the session's group, and with the user's branch.
GROUP_LOYALTY = 0.7
BRANCH_LOYALTY = 0.4
# How often a session is after the user's usual group; the history tells the rest.
USUAL_GROUP = 0.3


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """One entry a visit, in indices of the population.

    Attributes:
        user: ``(B,)``.
        hour: ``(B,)``.
        candidate: ``(B,)`` items.
        history: ``(B, T)`` items, the latest last, left-aligned.
        history_length: ``(B,)``; entries of ``history`` beyond it mean nothing.
        dense: ``(B, F)``.
    """

    user: Ints
    hour: Ints
    candidate: Ints
    history: Ints
    history_length: Ints
    dense: NDArray[np.float32]

    @classmethod
    def draw(cls, population: Population, rows: int, rng: np.random.Generator) -> "Sessions":
        """Draw ``rows`` independent visits."""
        user_B = rng.integers(USERS, size=rows)
        usual_B = rng.random(rows) < USUAL_GROUP
        group_B = np.where(usual_B, population.user_group[user_B], rng.integers(GROUPS, size=rows))
        branch_B = population.user_branch[user_B]
        length_B = rng.integers(MIN_HISTORY, MAX_HISTORY + 1, size=rows)
        length_B[rng.random(rows) < EMPTY_SHARE] = 0
        shape = (rows, MAX_HISTORY)
        event_group_BT = _stay_or_wander(group_B[:, None], GROUP_LOYALTY, GROUPS, shape, rng)
        event_branch_BT = _stay_or_wander(branch_B[:, None], BRANCH_LOYALTY, BRANCHES, shape, rng)
        candidate_branch_B = _stay_or_wander(branch_B, BRANCH_LOYALTY, BRANCHES, (rows,), rng)
        return cls(
            user=user_B,
            hour=rng.integers(HOURS, size=rows),
            candidate=_item_of(candidate_branch_B, rng.integers(GROUPS, size=rows), rng),
            history=_item_of(event_branch_BT, event_group_BT, rng),
            history_length=length_B,
            dense=rng.standard_normal((rows, DENSE), dtype=np.float32),
        )


def _stay_or_wander(
    home: Ints, loyalty: float, choices: int, shape: tuple[int, ...], rng: np.random.Generator
) -> Ints:
    """``home`` with probability ``loyalty``, else any of ``choices``."""
    return np.where(rng.random(shape) < loyalty, home, rng.integers(choices, size=shape))


def _item_of(branch: Ints, group: Ints, rng: np.random.Generator) -> Ints:
    """An item of the leaf where branch and group meet; a leaf's first items are popular."""
    rank = (LEAF_ITEMS * rng.random(branch.shape) ** 2).astype(np.int64)
    return (branch * GROUPS + group) * LEAF_ITEMS + rank
