r"""How a step's time and memory grow, from lines of ``bench_train_throughput``: one picture.

    python -m benchmarks.bench_train_throughput --out growth.jsonl \
        --sweep rows=1e5,1e6,1e7 layers=1,2,4,8 experts=4,8,16,32,64
    python -m benchmarks.bench_train_throughput --out growth.jsonl --ranks 1 2 4 8 --sweep base weak
    python -m benchmarks.growth_plot growth.jsonl --out docs/growth.png

A panel each for rows of a table, ranks, layers of experts and experts of a layer. Of time it shows
the median of steps and the band from their 10th to their 90th percentile; of memory the peak of the
rank that needs most. A hollow mark is a measurement whose spread is too wide to conclude from. Of
several lines of one case the last counts, and of several series the one with most points is drawn.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import read_lines
from benchmarks.throughput.scaling import by_case, strong, TOLD_APART, weak

__all__ = ["PANELS", "Series", "draw_growth", "main", "series_of"]

Line = Mapping[str, Any]

PANELS: Mapping[str, str] = {
    "rows": "rows of a table",
    "world_size": "ranks",
    "layers": "layers of experts, L",
    "experts": "experts of a layer, E",
}
SAME = ("world_size", "batch_size", "threads", "device")  # in all lines of a series, but of ranks'
SWEEPS = {"world_size": "--ranks 1 2 4 8"}  # how a panel's lines are measured, if not by its name
TIME, MEMORY = "C0", "C1"
STYLES = ("-", "--")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Series:
    """Lines that differ in one thing, in its order.

    Attributes:
        name: Such as ``strong``; empty where a panel has one.
        varied: The name of that thing.
        lines: At least two.
    """

    name: str
    varied: str
    lines: Sequence[Line]

    def values(self, figure: str, group: str | None = None) -> list[float]:
        """Return a figure of each line, of a group of figures if one is named."""
        return [float((line[group] if group else line)[figure]) for line in self.lines]


def series_of(lines: Sequence[Line], varied: str) -> list[Series]:
    """Find the lines that show how one thing grows.

    Args:
        lines: As ``bench_train_throughput`` writes them; others are passed over.
        varied: A name in :data:`PANELS`.

    Returns:
        The longest series; two, strong and weak scaling, of ranks; none if nothing varies.
    """
    if varied == "world_size":
        groups = list(by_case(lines).values())
        found = [
            [
                Series(name=name, varied=varied, lines=_last(pick(group), varied))
                for name, pick in (("strong scaling", strong), ("weak scaling", weak))
            ]
            for group in groups
        ]
    else:
        apart: dict[str, list[Line]] = {}
        others = [name for name in (*TOLD_APART, *SAME) if name != varied]
        for line in lines:
            # No layers is another model, not the first of some.
            if line.get("bench") == "train_throughput" and line[varied]:
                apart.setdefault(json.dumps([line[name] for name in others]), []).append(line)
        found = [
            [Series(name="", varied=varied, lines=_last(group, varied))] for group in apart.values()
        ]
    grown = [[series for series in them if len(series.lines) > 1] for them in found]
    return max(grown, key=lambda them: sum(len(series.lines) for series in them), default=[])


def draw_growth(lines: Sequence[Line], file: Path) -> None:
    """Draw all panels; one without lines says how to measure them.

    Args:
        lines: What was measured.
        file: Where to write it; its ending says in which format.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no panel has anything to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_growth needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from error

    panels = {varied: series_of(lines, varied) for varied in PANELS}
    if not any(panels.values()):
        raise ValueError(
            "no two lines differ in nothing but rows, ranks, layers or experts. Measure some: "
            "python -m benchmarks.bench_train_throughput --sweep rows layers experts --out FILE."
        )
    figure = Figure(figsize=(7.6, 6.8), layout="constrained")
    first = [them[0] for them in panels.values() if them]  # weak scaling has many batches
    figure.suptitle(_title([line for series in first for line in series.lines]), fontsize=9)
    axes = figure.subplots(2, 2).flat
    for axis, (varied, series) in zip(axes, panels.items(), strict=True):
        axis.set_xlabel(PANELS[varied])
        if series:
            _draw(axis, series)
        else:
            how = SWEEPS.get(varied, f"--sweep {varied}")
            axis.text(0.5, 0.5, f"not measured: {how}", ha="center", transform=axis.transAxes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str]) -> int:
    """Draw and return 0, or 2 if there is nothing to draw or to draw with."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth_plot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args(argv)
    try:
        draw_growth([line for file in args.files for line in read_lines(file)], args.out)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _draw(axis: Any, drawn: Sequence[Series]) -> None:
    memory = axis.twinx()
    for series, style in zip(drawn, STYLES, strict=False):
        at = series.values(series.varied)
        low, middle, high = (series.values(it, "step_ms") for it in ("p10", "p50", "p90"))
        axis.fill_between(at, low, high, color=TIME, alpha=0.15, linewidth=0)
        axis.plot(at, middle, style, color=TIME, label=series.name)
        for place, line in enumerate(series.lines):
            face = TIME if line["conclusive"] else "white"
            axis.plot(at[place], middle[place], "o", color=TIME, markerfacecolor=face)
        peak = [value / MIB for value in series.values("peak_bytes")]
        memory.plot(at, peak, style, color=MEMORY, marker="s", markersize=4)
    ticks = sorted({value for series in drawn for value in series.values(series.varied)})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [_short(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylabel("step, ms (10 to 90 % of steps)", color=TIME)
    memory.set_ylabel("peak memory of a rank, MiB", color=MEMORY)
    axis.set_ylim(bottom=0)  # so that what hardly grows does not look as if it did
    if drawn[0].varied == "rows":
        memory.set_yscale("log")
    else:
        memory.set_ylim(bottom=0)
    if len(drawn) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, ncols=2, frameon=False)


def _last(lines: Sequence[Line], varied: str) -> list[Line]:
    """The last line of each value, in the values' order."""
    newest = {line[varied]: line for line in lines}
    return [newest[value] for value in sorted(newest)]


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e+0", "e") if value >= 10_000 else f"{value:g}"  # noqa: PLR2004


def _title(lines: Sequence[Line]) -> str:
    told = []
    for name in ("backbone", "width", "batch_size", "length", "commit", "device"):
        values = sorted({str(line[name]) for line in lines})
        told.append(f"{name.replace('_size', '')} {' and '.join(values)}")
    return ", ".join(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
