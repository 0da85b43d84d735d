"""Curves and heat maps of a run as PNG. Needs the extra ``plots``."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchrec_hilomoe.training.page.files import Band, Row, RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "routing"]

PANELS = (
    ("logloss", "logloss"),
    ("auc", "AUC"),
    ("gauc", "GAUC"),
    ("ne", "normalised entropy"),
    ("calibration", "calibration (1 is right)"),
    ("auxiliary_loss", "auxiliary loss"),
    ("learning_rate", "learning rate"),
    ("samples_per_second", "samples per second"),
    ("memory_gib", "memory, GiB (first rank)"),
)
STYLES = {
    "train": {"color": "#4c78a8", "linewidth": 1.2, "alpha": 0.8},
    "valid": {"color": "#e45756", "linewidth": 1.6, "marker": "o", "markersize": 3},
}
BAND_COLORS = ("#eef3fb", "#fdf3e4")
COLUMNS = 3
NARROWEST_NAMED = 0.05  # of the run; others are in the table of stages
BRIGHTEST = 4  # times a balanced load; what is above looks the same


def curves(run: RunFiles) -> bytes:
    """Draw every metric over steps, on bands that are the stages."""
    drawn = [(name, title) for name, title in PANELS if run.of("train", name)[0]]
    rows = -(-len(drawn) // COLUMNS)
    figure = _figure(4.6 * COLUMNS, 2.9 * max(rows, 1))
    bands = run.bands()
    for at, (name, title) in enumerate(drawn):
        axes = figure.add_subplot(rows, COLUMNS, at + 1)
        for split, style in STYLES.items():
            steps, values = run.of(split, name)
            if steps:
                axes.plot(steps, values, label=split, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0)
        _draw_bands(axes, bands, named=at == 0)
        if at == 0:
            axes.legend(fontsize=8, loc="upper right")
    return _png(figure)


def routing(site: str, rows: Sequence[Row]) -> bytes:
    """Draw a site's loads, a heat map a layer: steps to the right, experts upwards.

    Args:
        site: Its name.
        rows: Its lines of routing.
    """
    layers = sorted({row["layer"] for row in rows})
    experts = max(len(row["load"]) for row in rows)
    height = 0.9 + 0.11 * experts
    figure = _figure(4.6 * COLUMNS, height * len(layers) + 0.4)
    figure.suptitle(f"{site}: share of rows that each expert got", fontsize=10)
    shared = None
    for at, layer in enumerate(layers):
        axes = figure.add_subplot(len(layers), 1, at + 1, sharex=shared)
        shared = shared or axes
        here = [row for row in rows if row["layer"] == layer]
        steps = [row["step"] for row in here]
        picture = axes.pcolormesh(
            _edges(steps),
            range(experts + 1),
            [[row["load"][expert] for row in here] for expert in range(experts)],
            cmap="viridis",
            vmin=0,
            vmax=min(1.0, BRIGHTEST / experts),
        )
        figure.colorbar(picture, ax=axes, pad=0.01, extend="max")
        axes.set_ylabel(f"layer {layer}", fontsize=8)
        axes.set_title(f"entropy at the end {here[-1]['entropy']:.2f}", fontsize=8, loc="right")
        axes.tick_params(labelsize=8)
    if shared is not None:
        figure.axes[2 * len(layers) - 2].set_xlabel("step", fontsize=8)
    return _png(figure)


def _edges(steps: Sequence[int]) -> list[float]:
    """Each line tells of the steps since the one before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [max(0, first), *steps]


def _draw_bands(axes: "Axes", bands: Sequence[Band], *, named: bool) -> None:
    for at, band in enumerate(bands):
        axes.axvspan(band.start, band.stop, color=BAND_COLORS[at % 2], zorder=-1)
        if named and band.stop - band.start > NARROWEST_NAMED * bands[-1].stop:
            axes.text(
                (band.start + band.stop) / 2,
                0.02,
                band.stage,
                rotation=90,
                fontsize=6,
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
            "a run's page needs matplotlib: pip install 'torchrec-hilomoe[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
