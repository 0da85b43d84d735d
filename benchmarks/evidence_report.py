"""Paired differences with their intervals, and AUC over FLOPs, from the lines of `evidence`."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as students_t

__all__ = ["Line", "report"]

Line = dict[str, Any]
BASE = "plain"
WIDE = 5  # costs that differ more than this are drawn on a logarithmic axis
NOT_DENSE = ("head", "all", "deeper", "rank", "flat")


def report(lines: list[Line], plot: Path | None) -> None:
    """Print a Markdown table for each data set and backbone, and draw them all."""
    runs = [line for line in lines if line["test"] is not None]
    groups = sorted({(line["data"], line["backbone"]) for line in runs})
    for data, backbone in groups:
        own = [line for line in runs if (line["data"], line["backbone"]) == (data, backbone)]
        print(f"\n### {data}, {backbone}\n")
        print(table(own))
    if plot is not None:
        draw(runs, plot)


def table(runs: list[Line]) -> str:
    """A row a variant; differences in AUC to the plain model of the same seed, in 1e-4."""
    lines = [
        "| variant | kFLOP/sample | AUC | GAUC | logloss | to plain, 1e-4: mean ± 95 % (each) "
        "| experts/base | samples/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = {run["seed"]: run["test"]["auc"] for run in runs if run["variant"] == BASE}
    for variant in sorted({run["variant"] for run in runs}, key=lambda v: _flops(runs, v)):
        own = [run for run in runs if run["variant"] == variant]
        paired = [(run["test"]["auc"] - base[run["seed"]]) * 1e4 for run in own]
        ratios = [run["output_ratio"] for run in own if run["output_ratio"] is not None]
        speeds = [run["samples_per_second"] for run in own if "samples_per_second" in run]
        cells = [
            variant,
            f"{_flops(runs, variant) / 1e3:.1f}",
            *(mean([run["test"].get(name) for run in own]) for name in SCORES),
            "" if variant == BASE else difference(paired),
            f"{np.mean(ratios):.3f}" if ratios else "",
            f"{np.median(speeds):,.0f}" if speeds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SCORES = ("auc", "gauc", "logloss")


def mean(values: list[float | None]) -> str:
    """Of what was measured."""
    measured = [value for value in values if value is not None]
    return f"{np.mean(measured):.4f}" if measured else ""


def difference(paired: list[float]) -> str:
    """The mean with its 95 % interval (Student's t over seeds), and each seed's."""
    each = ", ".join(f"{value:+.1f}" for value in paired)
    if len(paired) < 2:
        return f"{paired[0]:+.1f} (one seed)"
    spread = float(np.std(paired, ddof=1)) / len(paired) ** 0.5
    half = float(students_t.ppf(0.975, len(paired) - 1)) * spread
    return f"{np.mean(paired):+.1f} ± {half:.1f} ({each})"


def draw(runs: list[Line], picture: Path) -> None:
    """AUC over FLOPs: a panel a data set, a colour a backbone, a marker a kind of model."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(run["data"] for run in runs))
    backbones = list(dict.fromkeys(run["backbone"] for run in runs))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    for axis, data in zip(axes.flat, names, strict=False):
        for color, backbone in enumerate(backbones):
            own = [run for run in runs if (run["data"], run["backbone"]) == (data, backbone)]
            if not own:
                continue
            dense = sorted(
                (_flops(own, v), _auc(own, v), v)
                for v in {run["variant"] for run in own}
                if not v.startswith(NOT_DENSE)
            )
            axis.plot(
                [flops for flops, _, _ in dense],
                [auc for _, auc, _ in dense],
                marker="o",
                color=f"C{color}",
                label=f"{backbone}, dense",
            )
            for variant in {run["variant"] for run in own} - {v for _, _, v in dense}:
                at = (_flops(own, variant), _auc(own, variant))
                axis.plot(*at, marker=_marker(variant), color=f"C{color}", linestyle="")
                axis.annotate(variant, at, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(title=data, xlabel="FLOPs per sample", ylabel="test AUC")
        costs = [run["flops"] for run in runs if run["data"] == data]
        if max(costs) > WIDE * min(costs):
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.savefig(picture, dpi=130)


def _marker(variant: str) -> str:
    return "x" if "random" in variant else "s" if variant == "deeper" else "^"


def _flops(runs: list[Line], variant: str) -> int:
    return next(run["flops"] for run in runs if run["variant"] == variant)


def _auc(runs: list[Line], variant: str) -> float:
    """The plain model's mean plus the mean difference to it.

    Not every variant has run for every seed, and seeds differ by more than variants do.
    """
    base = {run["seed"]: run["test"]["auc"] for run in runs if run["variant"] == BASE}
    own = [run for run in runs if run["variant"] == variant]
    gains = [run["test"]["auc"] - base[run["seed"]] for run in own]
    return float(np.mean(list(base.values())) + np.mean(gains))
