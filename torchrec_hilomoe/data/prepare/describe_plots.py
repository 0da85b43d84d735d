"""A described folder as pictures: clicks, lengths of histories, skew of vocabularies."""

from collections.abc import Mapping

import numpy as np

from torchrec_hilomoe.data.prepare.describe import describe, Description, SplitDescription
from torchrec_hilomoe.runtime.paths import open_binary, path_manager

__all__ = ["describe_and_draw", "draw"]


def describe_and_draw(folder: str, *, plots: str | None = None) -> Description:
    """Describe a prepared folder: clicks, lengths, skew, and signs of leaks.

    Args:
        folder: A folder that was prepared.
        plots: Folder to draw label rate, lengths and skew into.

    Returns:
        What was found.

    Raises:
        DataError: If the folder is not whole or unreadable.
        ModuleNotFoundError: If it is to be drawn without the extra ``plots``.
    """
    found = describe(folder.rstrip("/"))
    if plots is not None:
        draw(found, plots)
    return found


def draw(description: Description, folder: str) -> tuple[str, ...]:
    """Draw a folder's description; matplotlib is the extra ``plots``.

    Args:
        description: What :func:`~torchrec_hilomoe.data.prepare.describe.describe` found.
        folder: Gets the files.

    Returns:
        The PNG files.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; names the extra.
    """
    pictures = {
        "label_rate": _label_rate,
        "lengths": _lengths,
        "vocabularies": _vocabularies,
    }
    path_manager.mkdirs(folder)
    paths = []
    for name, make in pictures.items():
        figure = _figure()
        axes = figure.add_subplot()
        make(axes, description.splits)
        axes.set_title(f"{description.dataset}: {axes.get_title()}")
        path = f"{folder.rstrip('/')}/{name}.png"
        with open_binary(path, "wb") as sink:
            figure.savefig(sink, format="png")
        paths.append(path)
    return tuple(paths)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '--plots wants matplotlib: pip install "matplotlib>=3.8,<4".'
        ) from error
    return Figure(figsize=(5.2, 3.6), layout="constrained", dpi=130)  # read on a phone


def _label_rate(axes, splits: Mapping[str, SplitDescription]) -> None:
    bars = axes.bar(list(splits), [split.clicks / split.rows for split in splits.values()])
    axes.bar_label(bars, [f"{s.clicks / s.rows:.2%} of {s.rows:,}" for s in splits.values()])
    axes.margins(y=0.12)
    axes.set_title("share of rows with label 1")
    axes.set_ylabel("label rate")


def _lengths(axes, splits: Mapping[str, SplitDescription]) -> None:
    for (name, split), style in zip(splits.items(), ("-", "--", ":"), strict=False):
        for color, (group, counts) in enumerate(split.lengths.items()):
            # The share of rows with at least so many events: lengths of 0 and cut ones show.
            share = counts[::-1].cumsum()[::-1] / max(counts.sum(), 1)
            axes.step(
                np.arange(len(counts)),
                share,
                where="pre",
                label=f"{group}, {name}",
                color=f"C{color}",
                linestyle=style,
            )
    # A logarithm that has a place for 0.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3, subs=(2, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0)
    axes.set_ylim(0, 1.03)
    axes.set_title("lengths of histories")
    axes.set_xlabel("events in the history")
    axes.set_ylabel("share of rows with at least as many")
    if axes.lines:
        axes.legend(fontsize="small")


def _vocabularies(axes, splits: Mapping[str, SplitDescription]) -> None:
    name, split = next(iter(splits.items()))
    for table, counts in split.ids.items():
        falling = np.sort(counts[1:][counts[1:] > 0])[::-1]
        if len(falling):
            axes.loglog(np.arange(1, len(falling) + 1), falling, label=table)
    axes.set_title(f"how often ids occur in {name}")
    axes.set_xlabel("ids of a table, the most frequent first")
    axes.set_ylabel("occurrences")
    if axes.lines:
        axes.legend(fontsize="small")
