"""AUC over FLOPs, both against the plain model: a panel a data set.

A mark is the mean over the seeds that the variant and the plain model both have, its whisker their
range. Costs and gains are relative, so that backbones and data sets of different size compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from benchmarks.experiments.report import (
    differences,
    flops,
    grouped,
    Line,
    of_base,
    variants_of,
)

__all__ = ["draw"]

COLUMNS = 2
WIDE = 3  # costs that differ by more than this factor are drawn on a logarithmic axis, with
TICKS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
LABEL_WIDTH, LABEL_HEIGHT = 150, 9  # points that a label keeps for itself


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is drawn alike.

    Attributes:
        label: In the legend.
        marker: Matplotlib's.
        holds: Whether a variant of this name is one.
        aside: Points to the right, for marks that would hide each other.
        joined: Whether a line joins them.
        filled: Whether the mark is.
    """

    label: str
    marker: str
    holds: Callable[[str], bool]
    aside: float = 0.0
    joined: bool = False
    filled: bool = True


# The first that holds is a variant's.
KINDS = (
    Kind(label="auto", marker="*", holds=lambda v: v == "auto"),
    Kind(label="experts, routed by what a probe found", marker="d", holds=lambda v: "probed" in v),
    Kind(
        label="by feature, at random",
        marker="x",
        holds=lambda v: "feature, random" in v,
        aside=4,
    ),
    Kind(label="experts, routed by feature", marker="P", holds=lambda v: "feature" in v),
    Kind(label="experts, routed at random", marker="X", holds=lambda v: "random" in v, aside=4),
    Kind(label="experts, routed by side", marker="p", holds=lambda v: "side" in v),
    Kind(label="experts, routed by sample", marker="v", holds=lambda v: "sample" in v, aside=-4),
    Kind(label="experts on all sites", marker="D", holds=lambda v: v.startswith("all")),
    Kind(
        label="experts on the head",
        marker="^",
        holds=lambda v: v.startswith(("head", "rank", "flat")),
    ),
    Kind(label="deeper, dense", marker="s", holds=lambda v: v == "deeper", filled=False),
    Kind(label="dense: narrower to wider", marker="o", holds=lambda _: True, joined=True),
)


def draw(runs: Sequence[Line], picture: Path) -> None:
    """Draw what was tested to a file whose suffix says the format; tuning is left out."""
    runs = [run for own in grouped(runs).values() for run in own]
    data = list(dict.fromkeys(run["data"] for run in runs))
    backbones = list(dict.fromkeys(run["backbone"] for run in runs))
    labelled = len(backbones) == 1
    columns = 1 if labelled else min(COLUMNS, len(data))  # labels need the width
    rows = -(-len(data) // columns)
    size = (6.4, 3.8 * rows + 0.6) if labelled else (3.4 * columns, 3.0 * rows + 1.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, data, strict=False):
        panel(axis, name, [run for run in runs if run["data"] == name], backbones)
    for axis in axes.flat[len(data) :]:
        axis.axis("off")
    kinds = [kind for kind in KINDS if any(kind_of(run["variant"]) is kind for run in runs)]
    figure.legend(handles=_handles(kinds, backbones), loc="outside lower center", ncols=2)
    figure.suptitle("AUC against FLOPs: experts and wider dense models")
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def panel(axis: Axes, name: str, runs: Sequence[Line], backbones: Sequence[str]) -> None:
    """One data set; marks are labelled where a single backbone leaves them room."""
    costs, named = [], []
    for backbone in dict.fromkeys(run["backbone"] for run in runs):
        marks = marks_of([run for run in runs if run["backbone"] == backbone])
        costs += [mark.cost for mark in marks]
        color = f"C{backbones.index(backbone)}"
        for mark in marks:
            _put(axis, mark, color)
        joined = sorted((mark.cost, mark.mean) for mark in marks if mark.kind.joined)
        axis.plot(*zip(*joined, strict=True), color=color, linewidth=1)
        named += [mark for mark in marks if not mark.kind.joined]
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.set(
        title=name,
        xlabel="FLOPs a sample, plain model = 1",
        ylabel="AUC against plain, 1e-4",
    )
    if max(costs) > WIDE * min(costs):
        axis.set_xscale("log")
        axis.xaxis.set(
            major_locator=FixedLocator(TICKS),
            minor_locator=NullLocator(),
            major_formatter=FuncFormatter(lambda cost, _: f"{cost:g}"),
        )
    axis.margins(x=0.08, y=0.08)
    axis.autoscale_view()
    axis.grid(alpha=0.3)
    if len(backbones) == 1:
        _label(axis, named)  # at last, since the scale moves the marks


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One variant of a backbone on a data set; gains in 1e-4 AUC."""

    variant: str
    kind: Kind
    cost: float
    mean: float
    least: float
    most: float


def marks_of(runs: Sequence[Line]) -> list[Mark]:
    """Of every variant that shares a seed with the plain model."""
    unit = flops(of_base(runs))
    marks = []
    for variant in variants_of(runs):
        paired, kind = differences(runs, variant), kind_of(variant)
        if paired:
            marks.append(
                Mark(
                    variant=variant,
                    kind=kind,
                    cost=flops(run for run in runs if run["variant"] == variant) / unit,
                    mean=sum(paired) / len(paired),
                    least=min(paired),
                    most=max(paired),
                )
            )
    return marks


def kind_of(variant: str) -> Kind:
    """How a variant of this name is drawn."""
    return next(kind for kind in KINDS if kind.holds(variant))


def _put(axis: Axes, mark: Mark, color: str) -> None:
    # Marks put aside have a transform of their own, which limits do not hear of.
    axis.update_datalim([(mark.cost, mark.least), (mark.cost, mark.most)])
    scale = axis.figure.dpi_scale_trans
    axis.errorbar(
        mark.cost,
        mark.mean,
        yerr=[[mark.mean - mark.least], [mark.most - mark.mean]],
        marker=mark.kind.marker,
        color=color,
        markerfacecolor=color if mark.kind.filled else "white",
        markersize=6,
        elinewidth=0.5,
        transform=axis.transData + ScaledTranslation(mark.kind.aside / 72, 0, scale),
    )


def _label(axis: Axes, marks: Sequence[Mark]) -> None:
    """Name the marks at their right, each label high enough above those that it would hide."""
    axis.figure.canvas.draw()  # limits are final only then
    to_points = 72 / axis.figure.dpi
    placed: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.mean):
        at = (mark.cost, mark.mean)
        x, y = axis.transData.transform(at) * to_points
        below = [high + LABEL_HEIGHT for far, high in placed if abs(far - x) < LABEL_WIDTH]
        height = max([y, *below])
        placed.append((x, height))
        axis.annotate(
            mark.variant,
            at,
            xytext=(6 + mark.kind.aside, height - y - 3),
            textcoords="offset points",
            fontsize=7,
        )


def _handles(kinds: Sequence[Kind], backbones: Sequence[str]) -> list[Line2D]:
    def handle(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **style)  # pyright: ignore

    return [
        *(handle(b, color=f"C{i}", linewidth=4) for i, b in enumerate(backbones)),
        *(
            handle(
                kind.label,
                color="black",
                marker=kind.marker,
                markerfacecolor="black" if kind.filled else "white",
                linewidth=1 if kind.joined else 0,
            )
            for kind in kinds
        ),
    ]
