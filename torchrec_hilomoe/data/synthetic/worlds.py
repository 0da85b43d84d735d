r"""The true click probabilities: three worlds that differ in how rows compose.

A row's continuous inputs ``x`` pass through one hidden layer:

.. math:: z = v \cdot \mathrm{relu}\Big(W_0 x + \sum_{c \in C} (c_0 + U_c V_c x)\Big)

where ``C`` are the *changes* in force, each of rank ``RANK``:

- ``composed``: one for the history's group, one for the candidate's branch, one for the hour's
  context. 24 changes make 512 maps.
- ``tree``: one for the candidate's branch and one for its leaf: what the eight children of a
  branch mean has nothing to do with what another branch's children mean.
- ``smooth``: none; one map, as wide as the others', serves every row. A control.

In every world group, branch, context, user, item and the history's match with the candidate also
add to the logit. Every population is scaled to the same click rate and best AUC, so that worlds
and seeds compare.

Shape legend:
    B  rows
    X  continuous inputs
    H  hidden units
    C  changes
    R  rank of a change
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args, Literal

import numpy as np

from torchrec_hilomoe.data.synthetic.inputs import INPUTS, Inputs
from torchrec_hilomoe.data.synthetic.population import (
    BRANCHES,
    CONTEXTS,
    Floats,
    GROUPS,
    LEAVES,
    Population,
    Sessions,
)

__all__ = ["WORLDS", "World", "WorldName", "expected_auc"]

WorldName = Literal["composed", "tree", "smooth"]
WORLDS: tuple[WorldName, ...] = get_args(WorldName)

RANK = 2
HIDDEN = 32
# Which attributes change the map.
CHANGES: dict[WorldName, dict[str, int]] = {
    "composed": {"group": GROUPS, "branch": BRANCHES, "context": CONTEXTS},
    "tree": {"branch": BRANCHES, "leaf": LEAVES},
    "smooth": {},
}
# Attributes that move the logit by themselves, in every world.
ADDING = ("group", "branch", "context")
# Variance of the hidden layer's input that all changes bring, against 1 by the shared map.
CHANGE_VARIANCE = 2.0
# Standard deviations in logits: of each addend, and of the history's match with the candidate.
ADDEND_SCALE = 0.25
MATCH_SCALE = 0.8
# Every population is scaled to these, as measured on a probe of it.
CLICK_RATE = 0.2
BEST_AUC = 0.91
PROBE_ROWS = 8192
BISECTIONS = 30


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
        scale: What turns the map's output into logits; sets the best AUC.
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
    scale: float = 1.0
    intercept: float = 0.0

    @classmethod
    def draw(cls, name: WorldName, rng: np.random.Generator) -> "World":
        """Draw a population and a map, and set the scale of its logits and its click rate."""
        population = Population.draw(rng)
        counts = CHANGES[name].values()
        total = sum(counts)
        deviation = (CHANGE_VARIANCE / max(len(counts), 1)) ** 0.5
        raw = cls(
            name=name,
            population=population,
            shared=rng.normal(scale=INPUTS**-0.5, size=(INPUTS, HIDDEN)),
            down=rng.normal(scale=INPUTS**-0.5, size=(INPUTS, total * RANK)),
            up=rng.normal(scale=deviation * RANK**-0.5, size=(total * RANK, HIDDEN)),
            shift=rng.normal(scale=0.3, size=(total, HIDDEN)),
            readout=rng.normal(scale=HIDDEN**-0.5, size=HIDDEN),
            addend=rng.normal(scale=ADDEND_SCALE, size=(3, 8)),
        )
        probe = Inputs.of(population, Sessions.draw(population, PROBE_ROWS, rng))
        scale, intercept = _calibrate(raw._output(probe), raw._addends(probe))
        return replace(raw, scale=scale, intercept=intercept)

    def probabilities(self, sessions: Sessions) -> Floats:
        """The probability ``(B,)`` of a click on each visit's candidate."""
        inputs = Inputs.of(self.population, sessions)
        mapped_B = self.scale * self._output(inputs)
        return _sigmoid(self.intercept + mapped_B + self._addends(inputs))

    def _addends(self, inputs: Inputs) -> Floats:
        """Logits ``(B,)`` that do not pass through the map."""
        by_attribute_B = sum(
            self.addend[i, inputs.attributes[name]] for i, name in enumerate(ADDING)
        )
        bias_B = ADDEND_SCALE * (inputs.user_bias + inputs.item_bias)
        return by_attribute_B + bias_B + MATCH_SCALE * inputs.match

    def _output(self, inputs: Inputs) -> Floats:
        """``z``, ``(B,)``: all changes at once, those not in force masked."""
        x_BX = inputs.continuous
        rows = len(x_BX)
        in_force_BC = np.zeros((rows, len(self.shift)))
        first = 0
        for attribute, count in CHANGES[self.name].items():
            in_force_BC[np.arange(rows), first + inputs.attributes[attribute]] = 1.0
            first += count
        down_BCR = (x_BX @ self.down).reshape(rows, -1, RANK) * in_force_BC[:, :, None]
        hidden_BH = x_BX @ self.shared + in_force_BC @ self.shift
        hidden_BH += down_BCR.reshape(rows, -1) @ self.up
        return np.maximum(hidden_BH, 0.0) @ self.readout


def _sigmoid(logits: Floats) -> Floats:
    """Overflow-free logistic function."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def expected_auc(probability: Floats) -> float:
    """AUC of probabilities against labels drawn from them, averaged over the draw."""
    p = np.sort(probability)
    below = np.cumsum(1.0 - p) - 0.5 * (1.0 - p)
    return float((p * below).sum() / (p.sum() * (1.0 - p).sum()))


def _calibrate(output_B: Floats, addends_B: Floats) -> tuple[float, float]:
    """Scale of the map's output and intercept that give ``BEST_AUC`` and ``CLICK_RATE``."""

    def intercept_at(scale: float) -> float:
        logits_B = scale * output_B + addends_B
        return _root(lambda shift: _sigmoid(logits_B + shift).mean() - CLICK_RATE, -100.0, 100.0)

    def excess_auc(scale: float) -> float:
        logits_B = intercept_at(scale) + scale * output_B + addends_B
        return expected_auc(_sigmoid(logits_B)) - BEST_AUC

    scale = _root(excess_auc, 0.0, 20.0 / output_B.std())
    return scale, intercept_at(scale)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where ``rising`` crosses zero, by bisection."""
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return 0.5 * (low + high)
