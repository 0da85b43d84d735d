r"""The true click probabilities: three worlds that differ in how rows compose.

A row's continuous inputs ``x`` (dense columns, latents of candidate and interests, how well the
history matches the candidate's branch) pass through one hidden layer:

.. math:: z = v \cdot \mathrm{relu}\Big(W_0 x + \sum_{c \in C} (c_0 + U_c V_c x)\Big)

where ``C`` are the *changes* in force, each of rank ``RANK``:

- ``composed``: one for the history's group, one for the candidate's branch, one for the hour's
  context. 24 changes make 512 maps.
- ``tree``: one for the candidate's branch and one for its leaf: what the eight children of a
  branch mean has nothing to do with what another branch's children mean.
- ``smooth``: none; one narrow map serves every row. A control.

In every world the three attributes, the user and the item also add to the logit. Probabilities are
functions of what a model sees and of the population alone, so the best AUC is within reach of a
model that has learnt the population.

Shape legend:
    B  rows
    X  continuous inputs
    H  hidden units
    C  changes
    R  rank of a change
    A  changes in force in a row
    T  longest possible history
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args, Literal

import numpy as np

from torchrec_hilomoe.data.synthetic.population import (
    BRANCHES,
    CONTEXTS,
    Floats,
    GROUPS,
    Ints,
    LATENT,
    LEAF_ITEMS,
    LEAVES,
    MAX_INTERESTS,
    Population,
)
from torchrec_hilomoe.data.synthetic.sessions import DENSE, MAX_HISTORY, Sessions

__all__ = ["WORLDS", "World", "WorldName"]

WorldName = Literal["composed", "tree", "smooth"]
WORLDS: tuple[WorldName, ...] = get_args(WorldName)

RANK = 2
INPUTS = DENSE + 2 * LATENT + 1
HIDDEN = {"composed": 64, "tree": 64, "smooth": 8}
# Which attributes change the map.
CHANGES: dict[WorldName, dict[str, int]] = {
    "composed": {"group": GROUPS, "branch": BRANCHES, "context": CONTEXTS},
    "tree": {"branch": BRANCHES, "leaf": LEAVES},
    "smooth": {},
}
# Attributes that move the logit by themselves, in every world.
ATTRIBUTES = ("group", "branch", "context")
# Variance of the hidden layer's input that all changes bring, against 1 by the shared map.
CHANGE_VARIANCE = 2.0
# An event weighs this much of the event after it.
FADING = 0.9
# About the mean and spread of the history's share of events in the candidate's branch.
MATCH_MEAN, MATCH_DEVIATION = 0.25, 0.25
# Standard deviations in logits: of the map, and of each addend.
MAP_SCALE = 2.5
ADDEND_SCALE = 0.25
CLICK_RATE = 0.2
PROBE_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class World:
    """A population and the map that makes its clicks.

    Attributes:
        name: Which of :data:`WORLDS`.
        population: Whom and what the rows are about.
        shared: ``W_0``, ``(X, H)``.
        down: Every ``V_c``, ``(X, C * R)``.
        up: Every ``U_c``, ``(C * R, H)``.
        shift: Every ``c_0``, ``(C, H)``.
        readout: ``v``, ``(H,)``.
        addend: Logits that each group, branch and context adds, ``(3, 8)``.
        centre: Mean of the map's output over the population.
        scale: What turns that output into logits.
        intercept: Sets the click rate.
    """

    name: WorldName
    population: Population
    shared: Floats
    down: Floats
    up: Floats
    shift: Floats
    readout: Floats
    addend: Floats
    centre: float = 0.0
    scale: float = 1.0
    intercept: float = 0.0

    @classmethod
    def draw(cls, name: WorldName, rng: np.random.Generator) -> "World":
        """Draw a population and a map, and set the scale of its logits and its click rate."""
        population = Population.draw(rng)
        hidden = HIDDEN[name]
        counts = CHANGES[name].values()
        total = sum(counts)
        deviation = (CHANGE_VARIANCE / max(len(counts), 1)) ** 0.5
        raw = cls(
            name=name,
            population=population,
            shared=rng.normal(scale=INPUTS**-0.5, size=(INPUTS, hidden)),
            down=rng.normal(scale=INPUTS**-0.5, size=(INPUTS, total * RANK)),
            up=rng.normal(scale=deviation * RANK**-0.5, size=(total * RANK, hidden)),
            shift=rng.normal(scale=0.3, size=(total, hidden)),
            readout=rng.normal(scale=hidden**-0.5, size=hidden),
            addend=rng.normal(scale=ADDEND_SCALE, size=(3, 8)),
        )
        probe = raw._inputs(Sessions.draw(population, PROBE_ROWS, rng))
        output_B = raw._output(probe)
        scaled = replace(raw, centre=output_B.mean(), scale=MAP_SCALE / output_B.std())
        return replace(scaled, intercept=_intercept_for(CLICK_RATE, scaled._logits(probe)))

    def probabilities(self, sessions: Sessions) -> Floats:
        """The probability ``(B,)`` of a click on each visit's candidate."""
        return _sigmoid(self._logits(self._inputs(sessions)))

    def _logits(self, inputs: "_Inputs") -> Floats:
        """Logits ``(B,)``."""
        visible_B = sum(self.addend[i, inputs.attributes[a]] for i, a in enumerate(ATTRIBUTES))
        mapped_B = self.scale * (self._output(inputs) - self.centre)
        return self.intercept + mapped_B + visible_B + inputs.bias_B

    def _output(self, inputs: "_Inputs") -> Floats:
        """``z``, ``(B,)``: all changes at once, those not in force masked."""
        rows = len(inputs.x_BX)
        in_force_BC = np.zeros((rows, len(self.shift)))
        first = 0
        for attribute, count in CHANGES[self.name].items():
            in_force_BC[np.arange(rows), first + inputs.attributes[attribute]] = 1.0
            first += count
        down_BCR = (inputs.x_BX @ self.down).reshape(rows, -1, RANK) * in_force_BC[:, :, None]
        hidden_BH = inputs.x_BX @ self.shared + in_force_BC @ self.shift
        hidden_BH += down_BCR.reshape(rows, -1) @ self.up
        return np.maximum(hidden_BH, 0.0) @ self.readout

    def _inputs(self, sessions: Sessions) -> "_Inputs":
        """What the map sees of ``sessions``."""
        people = self.population
        rows = len(sessions.user)
        leaf_B = sessions.candidate // LEAF_ITEMS
        branch_B = leaf_B // GROUPS
        event_leaf_BT = sessions.history // LEAF_ITEMS

        # An event weighs less the older it is, and padding weighs nothing.
        age_BT = sessions.history_length[:, None] - 1 - np.arange(MAX_HISTORY)
        weight_BT = np.where(age_BT >= 0, FADING ** np.maximum(age_BT, 0), 0.0)
        slot_BT = np.arange(rows)[:, None] * GROUPS + event_leaf_BT % GROUPS
        votes = np.bincount(slot_BT.ravel(), weight_BT.ravel(), minlength=rows * GROUPS)
        same_BT = event_leaf_BT // GROUPS == branch_B[:, None]
        match_B = (weight_BT * same_BT).sum(1) / np.maximum(weight_BT.sum(1), 1.0)

        declared_BM = people.interest_latent[people.user_interests[sessions.user]]
        count_B = people.user_interest_count[sessions.user]
        is_declared_BM = np.arange(MAX_INTERESTS) < count_B[:, None]
        interest_BL = np.einsum("bml,bm->bl", declared_BM, is_declared_BM / count_B[:, None] ** 0.5)
        x_BX = np.concatenate(
            [
                sessions.dense,
                people.item_latent[sessions.candidate],
                interest_BL,
                (match_B[:, None] - MATCH_MEAN) / MATCH_DEVIATION,
            ],
            axis=1,
        )
        return _Inputs(
            x_BX=x_BX,
            attributes={
                "group": votes.reshape(rows, GROUPS).argmax(1),
                "branch": branch_B,
                "context": people.hour_context[sessions.hour],
                "leaf": leaf_B,
            },
            bias_B=ADDEND_SCALE
            * (people.user_bias[sessions.user] + people.item_bias[sessions.candidate]),
        )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Continuous inputs ``(B, X)``, attributes by name ``(B,)``, and biases ``(B,)`` in logits."""

    x_BX: Floats
    attributes: Mapping[str, Ints]
    bias_B: Floats


def _sigmoid(logits: Floats) -> Floats:
    """Overflow-free logistic function."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _intercept_for(rate: float, logits: Floats) -> float:
    """What to add to ``logits`` so that the mean probability is ``rate``, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _sigmoid(logits + middle).mean() < rate:
            low = middle
        else:
            high = middle
    return low
