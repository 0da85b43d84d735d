"""What lines of `evidence` and `bench_capacity` say: runs paired by seed with the plain model."""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["BASE", "SCORES", "Line", "differences", "flops", "of_base", "variants_of"]

Line = dict[str, Any]
BASE = "plain"
SCORES = ("auc", "gauc", "logloss")


def of_base(runs: Iterable[Line]) -> list[Line]:
    """Those of the plain model."""
    return [run for run in runs if run["variant"] == BASE]


def variants_of(runs: Sequence[Line]) -> list[str]:
    """The variants, cheapest first."""
    costs = {run["variant"]: run["flops"] for run in runs}
    return sorted(costs, key=lambda variant: (costs[variant], variant))


def flops(runs: Iterable[Line]) -> int:
    """Of a sample, forward; the same for every seed of a variant."""
    return next(iter(runs))["flops"]


def differences(
    runs: Sequence[Line], variant: str, against: str = BASE, score: str = "auc"
) -> list[float]:
    """A score on the test split less another variant's of the same seed, in 1e-4, seed by seed.

    Args:
        runs: Of one backbone on one data set.
        variant: Whose.
        against: The other.
        score: One of :data:`SCORES`.
    """
    base = {run["seed"]: run["test"][score] for run in runs if run["variant"] == against}
    return [
        (run["test"][score] - base[run["seed"]]) * 1e4
        for run in sorted(runs, key=lambda run: run["seed"])
        if run["variant"] == variant and run["seed"] in base
    ]
