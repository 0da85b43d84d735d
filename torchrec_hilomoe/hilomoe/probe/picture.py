"""A probe's report as a picture: gains with their intervals, beside the controls."""

from pathlib import Path, PurePath
from textwrap import fill
from typing import Any

from torchrec_hilomoe.hilomoe.probe.buckets import WIDER
from torchrec_hilomoe.hilomoe.probe.report import ProbeReport
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["draw_probe"]

SHOWN = 12  # features; the rest are small
ABREAST = 3  # sites
GAP = 0.6  # rows between features and controls
HARM = 0.4  # of the width of gains is for losses; what is longer is cut, and an arrow says so
LETTERS = 11, 8  # of an inch: small ones, and those of the title
ARROW = 4  # to the left, its tip at the place
CHOSEN, OTHER, CONTROL = "#0f766e", "#94c9c2", "#9ca3af"


def draw_probe(report: ProbeReport, file: Path | str) -> None:
    """Draw a report.

    Args:
        report: What ``InteractionProbe.report`` returned.
        file: Where to write it, in a folder that exists; its ending says in which format, and PNG
            is taken where it has none.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.

    Example:
        >>> from torchrec_hilomoe.hilomoe import Gain
        >>> gain = Gain(name="hour", site="up", gain=0.005, low=0.004, high=0.006)
        >>> report = ProbeReport(
        ...     features=(gain,),
        ...     controls={},
        ...     layers=(),
        ...     route_by=(),
        ...     pays=False,
        ...     costs=(),
        ...     verdict="nothing decides",
        ...     not_judged={},
        ...     fit_rows=512,
        ...     held_out_rows=512,
        ... )
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     draw_probe(report, f"{folder}/probe.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_probe needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from error

    features = list(dict.fromkeys(gain.name for gain in report.features))
    names = [*features[:SHOWN], *report.controls]
    # In the model's order, which is that of the costs; of a report without, that of the gains.
    sites = [cost.site for cost in report.costs] or [gain.site for gain in report.features]
    sites = list(dict.fromkeys(sites))
    across = min(ABREAST, len(sites))
    down = -(-len(sites) // across)
    size = (2.3 + 3.7 * across, 1.3 + down * (0.85 + 0.29 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey="row")
    for axes in panels.flat[len(sites) :]:
        axes.set_visible(False)
    for place, site in enumerate(sites):
        _draw_site(panels.flat[place], report, site, names)
    for axes in panels[:, 0]:
        places = _places(report, names)
        axes.set_yticks(places, [_label(report, name) for name in names], fontsize=9)
        axes.set_ylim(places[-1] + 0.6, -0.6)
        for text, name in zip(axes.get_yticklabels(), names, strict=True):
            text.set_color("#6b7280" if name in report.controls else "black")
    small, large = (int(letters * size[0]) for letters in LETTERS)
    first = report.verdict.partition(". ")[0].removesuffix(".")
    figure.suptitle(fill(f"{first}.", large), x=0.01, ha="left", fontsize=12, fontweight="bold")
    rows = f"{report.fit_rows:,} rows fit, {report.held_out_rows:,} others judge"
    if WIDER not in report.controls:  # a paired probe
        rows = f"{report.held_out_rows:,} rows judge each other"
    figure.supxlabel(
        fill(f"predicted gain of one expert layer, in 1e-4 nats a row: {rows}", small), fontsize=9
    )
    with open_binary(str(file), "wb") as sink:
        figure.savefig(sink, format=PurePath(file).suffix[1:] or "png", dpi=130)


def _places(report: ProbeReport, names: list[str]) -> list[float]:
    """Where rows stand, the controls a little apart."""
    return [at + (GAP if name in report.controls else 0.0) for at, name in enumerate(names)]


def _label(report: ProbeReport, name: str) -> str:
    """A name, and the layers that it should route."""
    if name in report.controls:
        return f"control: {name}"
    layers = [str(at) for at, layer in enumerate(report.layers, 1) if layer.feature == name]
    return f"{name}  (layer {', '.join(layers)})" if report.pays and layers else name


def _draw_site(axes: Any, report: ProbeReport, site: str, names: list[str]) -> None:
    chosen = {layer.feature for layer in report.layers}
    told = [*report.features, *(gain for found in report.controls.values() for gain in found)]
    gains = {gain.name: gain for gain in told if gain.site == site}
    shown = [gains[name] for name in names]
    places = _places(report, names)
    colors = [
        CONTROL if name in report.controls else CHOSEN if name in chosen else OTHER
        for name in names
    ]
    values = [1e4 * gain.gain for gain in shown]
    # The mean over draws lies inside the interval of its resamples but for rounding.
    below = [max(0.0, 1e4 * (gain.gain - gain.low)) for gain in shown]
    above = [max(0.0, 1e4 * (gain.high - gain.gain)) for gain in shown]
    axes.barh(places, values, color=colors, height=0.7)
    axes.errorbar(
        values, places, xerr=[below, above], fmt="none", ecolor="#4b5563", elinewidth=1, capsize=2
    )
    ends = [1e4 * max(gain.high, gain.gain, 0.0) for gain in shown]
    room = max(ends) or 1.0
    for place, value, end in zip(places, values, ends, strict=True):
        text = f"{value:.0f}" if abs(value) >= 10 else f"{value:z.1f}"
        axes.text(end + 0.02 * room, place, text, va="center", fontsize=8, color="#4b5563")
    lowest = min(0.0, *(1e4 * gain.low for gain in shown))
    left = max(1.05 * lowest, -HARM * room)
    axes.set_xlim(left, 1.16 * room)
    for place, gain in zip(places, shown, strict=True):
        if 1e4 * gain.low < left:
            axes.plot(left, place, marker=ARROW, color="#4b5563", markersize=7)
    axes.axvline(0, color="#4b5563", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    price = [
        f"experts: +{cost.experts / cost.base:.0%} FLOPs"
        for cost in report.costs
        if cost.site == site
    ]
    axes.set_title("\n".join([site, *price]), loc="left", fontsize=9, color="#374151")
