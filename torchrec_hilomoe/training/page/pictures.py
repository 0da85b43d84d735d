"""Curves and heat maps of a run as PNG, readable on a phone. Needs the extra ``plots``."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchrec_hilomoe.training.page.files import Band, Row, RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "routing"]

PANELS = {
    "logloss": "logloss",
    "auc": "AUC",
    "gauc": "GAUC",
    "ne": "normalized entropy",
    "calibration": "calibration (1 is right)",
    "auxiliary_loss": "auxiliary loss",
    "learning_rate": "learning rate",
    "samples_per_second": "samples per second",
    "memory_gib": "memory of the first rank, GiB",
}
COLORS = {"train": "#4c78a8", "valid": "#e45756"}
BAND_COLORS = ("#eef3fb", "#fdf3e4")
WIDTH = 5.2  # inches
NARROWEST_NUMBERED = 0.04  # of the run; others are in the table of stages
BRIGHTEST = 4  # times a balanced load; what is above looks the same
MARKED = 30  # points at most that are marked


def curves(run: RunFiles) -> dict[str, bytes]:
    """Draw every metric over steps, on bands that are the stages; return pictures by title."""
    bands, pictures = run.bands(), {}
    for name, title in PANELS.items():
        series = {split: run.of(split, name) for split in COLORS}
        if not series["train"][0]:
            continue
        figure = _figure(WIDTH, 3.3)
        axes = figure.add_subplot()
        for split, (steps, values) in series.items():
            if steps:
                _draw_series(axes, split, steps, values)
        axes.set_title(title, pad=16)
        axes.set_xlabel("step (above: number of the stage)")
        axes.margins(x=0.02)
        _draw_bands(axes, bands)
        if series["valid"][0]:
            axes.legend()
        pictures[title] = _png(figure)
    return pictures


def routing(site: str, rows: Sequence[Row]) -> bytes:
    """Draw a site's loads, a heat map per layer: steps to the right, experts upwards.

    Args:
        site: Name of the site.
        rows: Lines of routing of that site.
    """
    layers = sorted({row["layer"] for row in rows})
    experts = max(len(row["load"]) for row in rows)
    figure = _figure(WIDTH, (1.1 + 0.09 * experts) * len(layers) + 0.9)
    figure.suptitle(f"{site}\nshare of rows per expert", fontsize=11)
    steps = sorted({row["step"] for row in rows})
    every = -(-experts // 8)
    drawn, picture = [], None
    for at, layer in enumerate(layers):
        axes = figure.add_subplot(len(layers), 1, at + 1, sharex=drawn[0] if drawn else None)
        drawn.append(axes)
        here = [row for row in rows if row["layer"] == layer]
        picture = axes.pcolormesh(
            _edges([row["step"] for row in here]),
            [expert - 0.5 for expert in range(experts + 1)],
            [[row["load"][expert] for row in here] for expert in range(experts)],
            cmap="viridis",
            vmin=0,
            vmax=min(1.0, BRIGHTEST / experts),
        )
        axes.set_yticks(range(0, experts, every))
        axes.set_ylabel("expert")
        entropy = f"entropy at the end {here[-1]['entropy']:.2f}, 1 is even"
        axes.set_title(f"layer {layer}: {entropy}", fontsize=10, loc="left")
        axes.tick_params(labelbottom=at == len(layers) - 1)
    drawn[-1].set_xlabel("step")
    drawn[-1].set_xlim(_edges(steps)[0], steps[-1])
    assert picture is not None
    figure.colorbar(picture, ax=drawn, pad=0.02, extend="max")
    return _png(figure)


def _draw_series(axes: "Axes", split: str, steps: Sequence[int], values: Sequence[float]) -> None:
    """Draw a line, on top of the frame, so that a single point at its edge is seen whole."""
    marker = "o" if len(steps) <= MARKED else ""
    axes.plot(
        steps,
        values,
        label=split,
        color=COLORS[split],
        linewidth=1.6,
        clip_on=False,
        zorder=3,
        marker=marker,
        markersize=7 if len(steps) == 1 else 4,
    )


def _edges(steps: Sequence[int]) -> list[float]:
    """Each line tells of the steps since the one before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [max(0, first), *steps]


def _draw_bands(axes: "Axes", bands: Sequence[Band]) -> None:
    for at, band in enumerate(bands):
        axes.axvspan(band.start, band.stop, color=BAND_COLORS[at % 2], zorder=-1)
        if band.stop - band.start > NARROWEST_NUMBERED * bands[-1].stop:
            axes.text(
                (band.start + band.stop) / 2,
                1.01,
                str(at + 1),
                fontsize=9,
                ha="center",
                va="bottom",
                color="#666666",
                transform=axes.get_xaxis_transform(),
            )


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a run's page needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return sink.getvalue()
