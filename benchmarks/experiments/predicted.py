"""Does a probe say the truth? What it predicted, beside what experts routed by it then brought.

    python -m benchmarks.experiments.predicted --plot docs/predicted.png

A point is one data set, backbone and seed of the evidence: the plain model and its experts, routed
by the probe's views, are trained alike. Its verdict is right if it says ``pays`` where they bring
more than 20e-4 test AUC, and not where they do not; seeds within 10e-4 of that line say neither.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from benchmarks.experiments.evidence import advised, PROBES, RESULTS
from benchmarks.experiments.report import BASE, grouped, Line
from benchmarks.experiments.runs import read
from benchmarks.experiments.variants import PROBED_VARIANT
from torchrec_hilomoe.hilomoe.probe.advice import LASTING_GAIN, PAYING_GAIN

__all__ = ["Point", "points_of", "rank_correlation", "table"]

LINE, MARGIN = 20.0, 10.0  # 1e-4 AUC
# What chooses the map in the generated worlds.
DECIDES = {"composed": {"category", "hour", "category_history"}, "tree": {"category"}}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A probe and what followed; ``predicted`` and ``left`` in 1e-4 nats, the others in 1e-4.

    ``left`` is what the second look found, or ``predicted``, where there was none.
    """

    data: str
    backbone: str
    seed: int
    features: tuple[str, ...]
    pays: bool
    predicted: float
    left: float
    auc: float
    logloss: float

    @property
    def near(self) -> bool:
        """Whether what experts brought is too near the line to say anything."""
        return abs(self.auc - LINE) <= MARGIN

    @property
    def right(self) -> bool:
        """Whether the verdict is what happened."""
        return self.pays == (self.auc > LINE)


def points_of(lines: Sequence[Line], probes: Sequence[Line]) -> list[Point]:
    """One for each probe whose plain model and experts were both tested."""
    groups, points = grouped(lines), []
    for probe in probes:
        tested = {
            line["variant"]: line["test"]
            for line in groups.get((probe["data"], probe["backbone"]), ())
            if line["seed"] == probe["seed"]
        }
        if not tested.keys() >= {BASE, PROBED_VARIANT}:
            continue
        plain, experts = tested[BASE], tested[PROBED_VARIANT]
        predicted = 1e4 * sum(layer["gain"] for layer in probe["layers"])
        later = probe.get("later")
        points.append(
            Point(
                data=probe["data"],
                backbone=probe["backbone"],
                seed=probe["seed"],
                features=tuple(dict.fromkeys(found["name"] for found in probe["features"])),
                pays=advised(probe),
                predicted=predicted,
                left=predicted if later is None else 1e4 * later["total"],
                auc=1e4 * (experts["auc"] - plain["auc"]),
                logloss=1e4 * (experts["logloss"] - plain["logloss"]),
            )
        )
    return points


def rank_correlation(points: Sequence[Point], of: str = "predicted") -> float:
    """Spearman's, of ``predicted`` or what was ``left`` with the AUC that was brought."""
    predicted, brought = (rankdata([getattr(it, name) for it in points]) for name in (of, "auc"))
    return float(np.corrcoef(predicted, brought)[0, 1])


def sayings(points: Sequence[Point]) -> str:
    """How many pairs there are, and how ranks agree."""
    first, last = (rank_correlation(points, of) for of in ("predicted", "left"))
    return (
        f"{len(points)} pairs of runs; rank correlation of the first look with AUC {first:.2f}, "
        f"of the last {last:.2f}"
    )


def table(points: Sequence[Point]) -> str:
    """A row a data set and backbone: order, verdicts, and each seed's prediction and outcome."""
    lines = [
        "| data, backbone | first is one that decides | verdict right | near the line "
        "| predicted, 1e-4 nats | left at the last look | brought, 1e-4 AUC | wrong seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, backbone in dict.fromkeys((it.data, it.backbone) for it in points):
        own = [it for it in points if (it.data, it.backbone) == (data, backbone)]
        first = [it.features[0] in DECIDES[data] for it in own] if data in DECIDES else []
        judged = [it for it in own if not it.near]
        wrong = [f"{it.seed} ({it.auc:+.0f})" for it in judged if not it.right]
        cells = [
            f"{data}, {backbone}",
            f"{sum(first)} of {len(first)}" if first else "",
            f"{len(judged) - len(wrong)} of {len(judged)}",
            str(len(own) - len(judged)),
            _range(it.predicted for it in own),
            _range(it.left for it in own),
            f"{np.mean([it.auc for it in own]):+.0f} ({_range(it.auc for it in own)})",
            ", ".join(wrong),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(points: Sequence[Point], picture: Path) -> None:
    """Draw what experts brought over what was predicted, a colour a data set."""
    from matplotlib import pyplot as plt  # an extra

    figure, axis = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    data = list(dict.fromkeys(it.data for it in points))
    backbones = list(dict.fromkeys(it.backbone for it in points))
    for it in points:
        axis.plot(
            max(it.left, 1.0),
            it.auc,
            marker="osD^v"[backbones.index(it.backbone)],
            color=f"C{data.index(it.data)}",
            markerfacecolor=f"C{data.index(it.data)}" if it.pays else "white",
            linestyle="",
            markersize=6,
        )
    axis.axhspan(LINE - MARGIN, LINE + MARGIN, color="grey", alpha=0.15, linewidth=0)
    axis.axhline(0, color="grey", linewidth=0.6)
    for line in (PAYING_GAIN, LASTING_GAIN):
        axis.axvline(1e4 * line, color="grey", linestyle="--", linewidth=0.8)
    axis.set_xscale("log")
    axis.set(
        xlabel="gain of all layers predicted at the last look, 1e-4 nats a row",
        ylabel="test AUC against plain, 1e-4",
        title="What a probe predicts, and what experts routed by it bring\n"
        f"{len(points)} pairs of runs, rank correlation {rank_correlation(points, 'left'):.2f}",
    )
    axis.title.set_fontsize("medium")
    axis.grid(alpha=0.3)
    handles = [
        *(axis.plot([], [], "o", color=f"C{i}", label=name)[0] for i, name in enumerate(data)),
        *(
            axis.plot([], [], "osD^v"[i], color="black", label=name)[0]
            for i, name in enumerate(backbones)
        ),
        axis.plot([], [], "o", color="black", markerfacecolor="white", label="verdict: no")[0],
    ]
    figure.legend(handles=handles, loc="outside right upper")
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _range(values: Iterable[float]) -> str:
    every = list(values)
    return f"{min(every):.0f} to {max(every):.0f}"


def main() -> None:
    """Print the table, and draw the picture."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the evidence's runs")
    parser.add_argument("--probes", type=Path, default=PROBES, help="what probes found")
    parser.add_argument("--plot", type=Path, help="draw it to this file")
    args = parser.parse_args()
    points = points_of(read(args.out), read(args.probes))
    if not points:
        parser.error(f"no probe of {args.probes} has both its runs in {args.out}")
    print(table(points))
    print(f"\n{sayings(points)}")
    if args.plot:
        draw(points, args.plot)


if __name__ == "__main__":
    main()
