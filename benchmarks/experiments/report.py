"""Runs paired by seed with the plain model: differences, their intervals, Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as students_t

__all__ = [
    "BASE",
    "SCORES",
    "Line",
    "compare",
    "compare_data",
    "differences",
    "flops",
    "grouped",
    "of_base",
    "report",
    "variants_of",
]

Line = dict[str, Any]
BASE = "plain"
SCORES = ("auc", "gauc", "logloss")


def report(lines: Sequence[Line], compared: Sequence[str] = ()) -> None:
    """Print a Markdown table for each data set and backbone.

    Args:
        lines: Those of tuning are left out.
        compared: Variants of which a table over all data sets and backbones comes first.
    """
    groups = grouped(lines)
    if compared:
        print(summary(groups, compared))
    for (data, backbone), own in groups.items():
        print(f"\n### {data}, {backbone}\n")
        print(table(own))


def compare(lines: Sequence[Line], variant: str, against: str) -> None:
    """Print what a variant adds to another, wherever both ran: every score, pair by pair."""
    print(f"| {variant}, against {against} | {' | '.join(SCORES)} |")
    print("|---" * (1 + len(SCORES)) + "|")
    for (data, backbone), runs in grouped(lines).items():
        paired = [differences(runs, variant, against, score) for score in SCORES]
        if paired[0]:
            print(f"| {data}, {backbone} | {' | '.join(map(difference, paired))} |")


def compare_data(lines: Sequence[Line], data: str, against: str) -> None:
    """Print what models gain from data of the same rows: every score, pair by pair."""
    print(f"| {data}, against {against} | {' | '.join(SCORES)} |")
    print("|---" * (1 + len(SCORES)) + "|")
    groups = grouped([line for line in lines if line["data"] in (data, against)])
    for backbone in dict.fromkeys(backbone for _, backbone in groups):
        both = [
            {**run, "variant": f"{run['variant']}, {run['data']}"}
            for name in (data, against)
            for run in groups.get((name, backbone), ())
        ]
        for variant in variants_of(groups.get((data, backbone), ())):
            mine, other = (f"{variant}, {name}" for name in (data, against))
            paired = [differences(both, mine, other, score) for score in SCORES]
            print(f"| {backbone}, {variant} | {' | '.join(map(difference, paired))} |")


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines with test scores by data set and backbone, in their order; tuning has none."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["test"] is not None:
            groups.setdefault((line["data"], line["backbone"]), []).append(line)
    return groups


def summary(groups: Mapping[tuple[str, str], Sequence[Line]], compared: Sequence[str]) -> str:
    """A row a data set and backbone: the plain model's AUC, and what each variant adds to it.

    In 1e-4, mean ± 95 % where there are seeds enough; in brackets FLOPs against the plain model's.
    """
    lines = [
        f"| data, backbone | seeds | plain | {' | '.join(compared)} |",
        "|---" * (3 + len(compared)) + "|",
    ]
    for (data, backbone), runs in groups.items():
        base = of_base(runs)
        cells = [f"{data}, {backbone}", str(len(base)), mean([run["test"]["auc"] for run in base])]
        for variant in compared:
            own = [run for run in runs if run["variant"] == variant]
            paired = differences(runs, variant)
            text = ""
            if paired:
                text = f"{difference(paired).partition(' (')[0]} ({flops(own) / flops(base):.2f})"
                if len(paired) < len(base):
                    text += f", of {len(paired)}"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(runs: Sequence[Line]) -> str:
    """A row a variant; differences in AUC to the plain model of the same seed, in 1e-4."""
    lines = [
        "| variant | kFLOP/sample | AUC | GAUC | logloss | to plain, 1e-4: mean ± 95 % (each) "
        "| experts/base | samples/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in variants_of(runs):
        own = [run for run in runs if run["variant"] == variant]
        ratios = [run["output_ratio"] for run in own if run["output_ratio"] is not None]
        speeds = [run["samples_per_second"] for run in own if "samples_per_second" in run]
        cells = [
            variant,
            f"{flops(own) / 1e3:.1f}",
            *(mean([run["test"].get(name) for run in own]) for name in SCORES),
            "" if variant == BASE else difference(differences(runs, variant)),
            f"{np.mean(ratios):.3f}" if ratios else "",
            f"{np.median(speeds):,.0f}" if speeds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: Sequence[float | None]) -> str:
    """Of what was measured."""
    measured = [value for value in values if value is not None]
    return f"{np.mean(measured):.4f}" if measured else ""


def difference(paired: Sequence[float]) -> str:
    """The mean with its 95 % interval (Student's t over seeds), and each seed's."""
    each = ", ".join(f"{value:+.1f}" for value in paired)
    if not paired:
        return "no plain run of its seed"
    if len(paired) < 2:
        return f"{paired[0]:+.1f} (one seed)"
    spread = float(np.std(paired, ddof=1)) / len(paired) ** 0.5
    half = float(students_t.ppf(0.975, len(paired) - 1)) * spread
    return f"{np.mean(paired):+.1f} ± {half:.1f} ({each})"


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
