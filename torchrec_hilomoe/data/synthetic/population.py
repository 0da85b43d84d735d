"""Who visits and what is on offer: fixed for a seed, shared by every split.

Items hang in a category tree: ``BRANCHES`` branches of ``GROUPS`` leaves each. A leaf is its
branch's share of one of the groups, which cut across the tree, so that a group (what a session is
after) says nothing about a branch (what the candidate is). Neither is a column: a model sees
shuffled ids of leaves and items, and learns from clicks what they have in common. A visit is a
user with a history, an hour, a candidate and its dense features.

Shape legend:
    B  visits
    T  longest possible history, ``MAX_HISTORY``
    F  dense features
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BRANCHES",
    "CONTEXTS",
    "DENSE",
    "GROUPS",
    "HOURS",
    "INTERESTS",
    "ITEMS",
    "LATENT",
    "LEAF_ITEMS",
    "LEAVES",
    "MAX_HISTORY",
    "MAX_INTERESTS",
    "USERS",
    "Floats",
    "Ints",
    "Population",
    "Sessions",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BRANCHES = 8
GROUPS = 8
LEAVES = BRANCHES * GROUPS
LEAF_ITEMS = 16
ITEMS = LEAVES * LEAF_ITEMS
USERS = 4096
HOURS = 24
CONTEXTS = 8
INTERESTS = 32
MAX_INTERESTS = 5
LATENT = 2


@dataclass(frozen=True, kw_only=True)
class Population:
    """Properties of users, items and hours, indexed from 0; columns carry ``*_id`` instead.

    Attributes:
        user_branch: The branch that a user visits most.
        user_group: The group that most of a user's sessions are after.
        user_bias: A user's readiness to click, in logits.
        user_interests: ``(USERS, MAX_INTERESTS)`` declared interests.
        user_interest_count: How many of those are declared; the rest is filler.
        interest_latent: ``(INTERESTS, LATENT)``.
        item_latent: ``(ITEMS, LATENT)``; items of a leaf resemble each other.
        item_bias: An item's attractiveness, in logits.
        item_id: What the columns call an item.
        leaf_id: What the columns call a leaf.
        hour_context: The context, of ``CONTEXTS``, that an hour belongs to.
    """

    user_branch: Ints
    user_group: Ints
    user_bias: Floats
    user_interests: Ints
    user_interest_count: Ints
    interest_latent: Floats
    item_latent: Floats
    item_bias: Floats
    item_id: Ints
    leaf_id: Ints
    hour_context: Ints

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Population":
        """Draw a population."""
        leaf_latent = rng.normal(size=(LEAVES, LATENT))
        spread = rng.normal(size=(ITEMS, LATENT))
        return cls(
            user_branch=rng.integers(BRANCHES, size=USERS),
            user_group=rng.integers(GROUPS, size=USERS),
            user_bias=rng.normal(size=USERS),
            user_interests=rng.integers(INTERESTS, size=(USERS, MAX_INTERESTS)),
            user_interest_count=rng.integers(1, MAX_INTERESTS + 1, size=USERS),
            interest_latent=rng.normal(size=(INTERESTS, LATENT)),
            item_latent=0.8 * np.repeat(leaf_latent, LEAF_ITEMS, axis=0) + 0.6 * spread,
            item_bias=rng.normal(size=ITEMS),
            item_id=1 + rng.permutation(ITEMS),
            leaf_id=1 + rng.permutation(LEAVES),
            hour_context=rng.permutation(np.arange(HOURS) % CONTEXTS),
        )


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
