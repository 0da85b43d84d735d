"""Draw the two pictures of the documents: ``make figures`` writes them beside this file.

Both are drawn as wide as a phone's screen, so that their smallest text can be read on one.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

__all__ = ["FIGURES", "draw_all"]

WIDTH = 4.2  # inches, at 95 dots per inch a phone's screen
BASE, SITE, QUIET = "#dbe7f6", "#f58518", "#f4f5f7"
EDGE, INK, GRAY = "#4c78a8", "#1f2933", "#5f6b7a"
TEXT, SMALL = 9.5, 8.5


def architecture() -> Figure:
    """From rows to a trained model: a box is a folder of the package, an arrow what travels."""
    figure, axes = _canvas(6.3)
    middle = WIDTH / 2
    _box(axes, 0.1, 5.55, 4.0, 0.6, "rows of clicks", "ids, histories, numbers; Parquet", "data/")
    _arrow(axes, (middle, 5.55), (middle, 5.15), "CTRBatch")
    _box(axes, 0.1, 4.55, 4.0, 0.6, "embedding tables", "sharded by TorchRec", "embeddings/")
    _arrow(axes, (middle, 4.55), (middle, 4.15), "SequenceFeatures")
    _box(axes, 0.1, 2.3, 4.0, 1.85, "", "", "backbones/")
    _text(axes, 0.22, 3.97, "a sequence model", weight="bold", ha="left")
    _text(axes, 0.22, 3.75, "DIN, DIEN, BST, TransAct, InterFormer", size=SMALL, ha="left")
    for left, name in ((0.3, "attention over\nthe history"), (2.25, "head")):
        _rectangle(axes, left, 2.75, 1.65, 0.78, face="white")
        _text(axes, left + 0.08, 3.29 if "\n" in name else 3.36, name, size=SMALL, ha="left")
        for at in range(3):
            _rectangle(axes, left + 0.12 + 0.5 * at, 2.82, 0.42, 0.22, face=SITE, edge=SITE)
    _arrow(axes, (1.95, 3.13), (2.25, 3.13))
    _rectangle(axes, 0.3, 2.43, 0.3, 0.17, face=SITE, edge=SITE)
    _text(axes, 0.68, 2.51, "site: a linear map with experts (hilomoe/)", size=SMALL, ha="left")
    _arrow(axes, (middle, 2.3), (middle, 1.9), "logits")
    _box(axes, 0.1, 1.3, 4.0, 0.6, "loss", "clicks, and balance of the experts", "models/")
    _arrow(axes, (middle, 1.3), (middle, 0.9), "pipeline, stage by stage")
    _box(axes, 0.1, 0.3, 4.0, 0.6, "trained model", "checkpoints, metrics, report", "training/")
    return figure


def site() -> Figure:
    """One linear map with three layers of experts, which all read the same input."""
    figure, axes = _canvas(6.1)
    layers, experts = 3, 8
    rng = np.random.default_rng(3)
    _text(axes, 1.22, 5.8, "input x", weight="bold")
    _rectangle(axes, 0.1, 1.55, 0.95, 3.55, face=BASE, edge=EDGE)
    _text(axes, 0.57, 3.55, "W x + c", weight="bold")
    _text(axes, 0.57, 3.05, "the linear\nmap as\nit was", size=SMALL)
    _line(axes, (1.22, 5.65), (1.22, 2.0))
    _line(axes, (1.22, 5.4), (0.57, 5.4))
    _arrow(axes, (0.57, 5.4), (0.57, 5.1))
    for layer in range(layers):
        bottom = 4.2 - 1.32 * layer
        _rectangle(axes, 1.4, bottom, 2.5, 0.9, face=QUIET, edge=GRAY)
        _arrow(axes, (1.22, bottom + 0.45), (1.4, bottom + 0.45))
        _line(axes, (3.9, bottom + 0.45), (4.05, bottom + 0.45))
        _text(axes, 1.5, bottom + 0.74, f"layer {layer + 1}", weight="bold", ha="left")
        scores = np.exp(1.3 * rng.standard_normal(experts))
        scores /= scores.max()
        best = int(scores.argmax())
        for expert, score in enumerate(scores):
            left = 1.52 + 0.185 * expert
            color = SITE if expert == best else EDGE
            height = 0.08 + 0.3 * float(score)
            axes.add_patch(Rectangle((left, bottom + 0.1), 0.13, height, color=color))
        _text(axes, 2.08, bottom + 0.74, f"scores: take {best + 1}", size=SMALL, ha="left")
        # The outer product of two vectors.
        axes.add_patch(Rectangle((3.12, bottom + 0.08), 0.09, 0.56, color=SITE))
        axes.add_patch(Rectangle((3.27, bottom + 0.55), 0.5, 0.09, color=SITE))
        axes.add_patch(Rectangle((3.27, bottom + 0.08), 0.5, 0.42, color=SITE, alpha=0.25))
        _text(axes, 3.5, bottom + 0.76, f"expert {best + 1}", size=SMALL)
        if layer < layers - 1:
            _arrow(axes, (1.75, bottom), (1.75, bottom - 0.42), "scores move the query")
    _line(axes, (4.05, 4.65), (4.05, 1.2))
    _line(axes, (0.57, 1.55), (0.57, 1.2))
    _line(axes, (0.57, 1.2), (4.05, 1.2))
    _arrow(axes, (WIDTH / 2, 1.2), (WIDTH / 2, 0.9), "sum")
    _text(axes, WIDTH / 2, 0.75, "output y", weight="bold")
    _text(
        axes, WIDTH / 2, 0.4, "An expert is two vectors. A row takes one of 8 × 8 × 8", size=SMALL
    )
    _text(axes, WIDTH / 2, 0.2, "compositions, and computes 3 rank-1 products.", size=SMALL)
    return figure


FIGURES: Mapping[str, Callable[[], Figure]] = {"architecture": architecture, "site": site}


def draw_all(folder: Path) -> list[Path]:
    """Draw every picture into a folder, and return the files."""
    files = []
    for name, draw in FIGURES.items():
        files.append(folder / f"{name}.png")
        draw().savefig(files[-1], dpi=250, metadata={"Software": None})
    return files


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(
    axes: Axes, left: float, bottom: float, width: float, height: float,
    title: str, detail: str, folder: str,
) -> None:  # fmt: skip
    _rectangle(axes, left, bottom, width, height, face=BASE, edge=EDGE)
    top = bottom + height
    _text(axes, left + 0.12, top - 0.18, title, weight="bold", ha="left")
    _text(axes, left + 0.12, top - 0.42, detail, size=SMALL, ha="left")
    _text(axes, left + width - 0.1, top - 0.18, folder, family="monospace", color=GRAY, ha="right")


def _rectangle(
    axes: Axes, left: float, bottom: float, width: float, height: float,
    *, face: str, edge: str = GRAY,
) -> None:  # fmt: skip
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle=style, facecolor=face, edgecolor=edge
        )
    )


def _line(axes: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    axes.plot(*zip(start, stop, strict=True), color=GRAY, linewidth=1.2)


def _arrow(
    axes: Axes, start: tuple[float, float], stop: tuple[float, float], text: str = ""
) -> None:
    style = {"arrowstyle": "-|>", "color": GRAY, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=stop, xytext=start, arrowprops=style)
    middle = (start[1] + stop[1]) / 2
    _text(axes, start[0] + 0.12, middle, text, size=SMALL, color=GRAY, ha="left")


def _text(
    axes: Axes, x: float, y: float, text: str, *, size: float = TEXT, ha: str = "center",
    color: str = INK, weight: str = "normal", family: str = "sans-serif",
) -> None:  # fmt: skip
    axes.text(x, y, text, fontsize=size, ha=ha, va="center", color=color, fontweight=weight,
              family=family)  # fmt: skip


def main() -> None:
    """Draw them, by default beside this file."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder")
    for file in draw_all(parser.parse_args().out):
        print(file)


if __name__ == "__main__":
    main()
