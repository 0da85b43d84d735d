"""Paired differences with their intervals, from the lines of `evidence`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as students_t

from benchmarks.evidence_lines import BASE, differences, flops, Line, variants_of
from benchmarks.evidence_plot import draw

__all__ = ["report"]

SCORES = ("auc", "gauc", "logloss")


def report(lines: Sequence[Line], plot: Path | None) -> None:
    """Print a Markdown table for each data set and backbone, and draw them all."""
    runs = [line for line in lines if line["test"] is not None]
    for data, backbone in sorted({(line["data"], line["backbone"]) for line in runs}):
        own = [line for line in runs if (line["data"], line["backbone"]) == (data, backbone)]
        print(f"\n### {data}, {backbone}\n")
        print(table(own))
    if plot is not None:
        draw(runs, plot)


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
