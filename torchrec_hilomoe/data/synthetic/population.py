"""Who visits and what is on offer: fixed for a seed, shared by every split.

Items hang in a category tree: ``BRANCHES`` branches of ``GROUPS`` leaves each. A leaf is its
branch's share of one of the groups, which cut across the tree, so that a group (what a session is
after) says nothing about a branch (what the candidate is). Neither is a column: a model sees
shuffled ids of leaves and items, and learns from clicks what they have in common.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BRANCHES",
    "CONTEXTS",
    "GROUPS",
    "HOURS",
    "INTERESTS",
    "ITEMS",
    "LATENT",
    "LEAF_ITEMS",
    "LEAVES",
    "MAX_INTERESTS",
    "USERS",
    "Floats",
    "Ints",
    "Population",
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
