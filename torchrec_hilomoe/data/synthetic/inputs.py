"""What decides a click: the quantities behind a visit's columns.

All are functions of what a model sees and of the population alone, so a model that has learnt the
population can reach the best AUC.

Shape legend:
    B  rows
    X  continuous inputs
    T  longest possible history
    M  most interests
    L  latent
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from torchrec_hilomoe.data.synthetic.population import (
    DENSE,
    Floats,
    GROUPS,
    Ints,
    LATENT,
    LEAF_ITEMS,
    MAX_HISTORY,
    MAX_INTERESTS,
    Population,
    Sessions,
)

__all__ = ["INPUTS", "Inputs"]

INPUTS = DENSE + 2 * LATENT + 1
# An event weighs this much of the event after it.
FADING = 0.9
# About the mean and spread of the history's share of events in the candidate's branch.
MATCH_MEAN, MATCH_DEVIATION = 0.25, 0.25
# Brings the mean of one to five interests to about unit variance.
INTEREST_SCALE = 1.5


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Quantities of one visit a row.

    Attributes:
        continuous: ``(B, X)``: dense columns, the latents of the candidate and of the user's
            interests, and ``match``; of about unit variance.
        attributes: ``(B,)`` by name: the history's ``group``, the candidate's ``branch`` and
            ``leaf``, the hour's ``context``.
        match: ``(B,)``, how much of the history is in the candidate's branch.
        user_bias: ``(B,)``.
        item_bias: ``(B,)``.
    """

    continuous: Floats
    attributes: Mapping[str, Ints]
    match: Floats
    user_bias: Floats
    item_bias: Floats

    @classmethod
    def of(cls, population: Population, sessions: Sessions) -> "Inputs":
        """Derive them from ``sessions``."""
        leaf_B = sessions.candidate // LEAF_ITEMS
        branch_B = leaf_B // GROUPS
        weight_BT = _event_weights(sessions.history_length)
        event_leaf_BT = sessions.history // LEAF_ITEMS
        match_B = _match(event_leaf_BT // GROUPS == branch_B[:, None], weight_BT)
        return cls(
            continuous=np.concatenate(
                [
                    sessions.dense.astype(np.float64),
                    population.item_latent[sessions.candidate],
                    _interests(population, sessions.user),
                    match_B[:, None],
                ],
                axis=1,
            ),
            attributes={
                "group": _main_group(event_leaf_BT % GROUPS, weight_BT),
                "branch": branch_B,
                "leaf": leaf_B,
                "context": population.hour_context[sessions.hour],
            },
            match=match_B,
            user_bias=population.user_bias[sessions.user],
            item_bias=population.item_bias[sessions.candidate],
        )


def _event_weights(lengths_B: Ints) -> Floats:
    """``(B, T)``: less the older the event is, nothing for padding."""
    age_BT = lengths_B[:, None] - 1 - np.arange(MAX_HISTORY)
    return np.where(age_BT >= 0, FADING ** np.maximum(age_BT, 0), 0.0)


def _main_group(group_BT: Ints, weight_BT: Floats) -> Ints:
    """The group with the most weight in each history; 0 if that is empty."""
    rows = len(group_BT)
    slot_BT = np.arange(rows)[:, None] * GROUPS + group_BT
    votes = np.bincount(slot_BT.ravel(), weight_BT.ravel(), minlength=rows * GROUPS)
    return votes.reshape(rows, GROUPS).argmax(axis=1)


def _match(same_branch_BT: np.ndarray, weight_BT: Floats) -> Floats:
    """Share of each history, by weight, that is in the candidate's branch; standardised."""
    total_B = np.maximum(weight_BT.sum(axis=1), 1.0)  # the latest event weighs 1
    share_B = (weight_BT * same_branch_BT).sum(axis=1) / total_B
    return (share_B - MATCH_MEAN) / MATCH_DEVIATION


def _interests(population: Population, user_B: Ints) -> Floats:
    """``(B, L)``, the mean latent of each user's declared interests, standardised."""
    count_B1 = population.user_interest_count[user_B, None]
    latent_BML = population.interest_latent[population.user_interests[user_B]]
    weight_BM = (np.arange(MAX_INTERESTS) < count_B1) / count_B1
    return INTEREST_SCALE * np.einsum("bml,bm->bl", latent_BML, weight_BM)
