"""A plan as a picture: memory and time of every rank, and what bounds a step. Extra ``plots``."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from torchrec_hilomoe.planning.run_plan import RunPlan
from torchrec_hilomoe.runtime.console import counted, format_bytes
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["draw_plan"]

NAMED = 8  # tables with a colour of their own; the others share one
OTHERS = "other tables"
GRAYS = ("0.55", "0.8")  # of what is no table
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9", "C8")  # the others'; C7 is a gray
APART = 32  # ranks at most that are bars of their own; more are one band
GIGABYTE = 2**30
MEGABYTE = 2**20
SMALL = 8


def draw_plan(plan: RunPlan, file: Path | str) -> None:
    """Draw memory and estimated time by rank, and the step.

    Args:
        plan: What to draw.
        file: Where to write it, in a folder that exists; its ending says in which format, and PNG
            is taken where it has none.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_plan needs matplotlib: pip install 'matplotlib>=3.8,<4'") from error

    figure = Figure(figsize=(6, 9.5), layout="constrained")
    panels = figure.subfigures(3, 1, squeeze=False, height_ratios=[3, 2, 1.6])
    memory, time, step = (panel.subplots() for panel in panels.flat)
    cluster = plan.cluster
    fits = "fits" if plan.excess <= 0 else "does NOT fit"
    where = f"{counted(cluster.world_size, 'rank')} on {counted(cluster.hosts, 'host')}"
    figure.suptitle(
        f"{where}, {plan.step.samples:,} rows a step:\n{fits}, bound by {plan.step.bound}"
    )
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    _draw_step(step, plan)
    with open_binary(str(file), "wb") as sink:
        figure.savefig(sink, format=PurePath(file).suffix[1:] or "png", dpi=120)


def _draw_memory(axes, plan: RunPlan) -> None:
    ranks = range(len(plan.ranks))
    largest = [table.table for table in plan.report.tables[:NAMED]]
    rest = {name for rank in plan.ranks for name in rank.tables} - set(largest)
    layers: dict[str, Sequence[float]] = {
        "dense: parameters, gradients, optimizers": [plan.dense.total] * len(plan.ranks),
        "saved for the backward pass": [plan.activations.bytes(plan.rows)] * len(plan.ranks),
    }
    # What is in host memory is no part of the device's.
    on_device = [
        rank.memory.device / (rank.memory.device + rank.memory.host or 1) for rank in plan.ranks
    ]
    for name in largest:
        layers[name] = [
            rank.tables.get(name, 0) * share
            for rank, share in zip(plan.ranks, on_device, strict=True)
        ]
    if rest:
        layers[OTHERS] = [
            sum(rank.tables.get(name, 0) for name in rest) * share
            for rank, share in zip(plan.ranks, on_device, strict=True)
        ]
    highest = max(plan.needed(rank) for rank in ranks)
    unit, name = (GIGABYTE, "GB") if highest > GIGABYTE / 10 else (MEGABYTE, "MB")
    below = [0.0] * len(plan.ranks)
    for color, (label, amounts) in zip(GRAYS + COLORS, layers.items(), strict=False):
        above = [low + amount / unit for low, amount in zip(below, amounts, strict=True)]
        _fill(axes, below, above, color=color, label=label)
        below = above
    axes.set_title(f"memory used of a device's {format_bytes(plan.capacity)}", loc="left")
    axes.set_ylabel(name)
    if plan.usable < 20 * highest:
        axes.axhline(plan.capacity / unit, color="black", label="a device's memory")
        axes.axhline(plan.usable / unit, color="black", linestyle=":", label="less headroom")
    _finish(axes, len(plan.ranks))


def _draw_time(axes, plan: RunPlan) -> None:
    lookup = [rank.time.lookup for rank in plan.ranks]
    both = [rank.time.total for rank in plan.ranks]
    _fill(axes, [0.0] * len(lookup), lookup, color="C0", label="lookup and update")
    _fill(axes, lookup, both, color="C1", label="exchange")
    axes.axhline(sum(both) / len(both), color="black", linestyle=":", label="mean")
    axes.set_title("time of a rank's tables in a micro-batch, estimated", loc="left")
    axes.set_ylabel("ms")
    _finish(axes, len(both))


def _draw_step(axes, plan: RunPlan) -> None:
    step = plan.step
    parts = {
        "memory": (
            ("lookup and update", step.lookup, "C0"),
            ("dense traffic", step.dense_memory, "0.55"),
        ),
        "network": (("exchange", step.exchange, "C1"), ("all-reduce", step.all_reduce, "C2")),
        "compute": (("matrix products", step.compute, "C3"),),
    }
    for place, (_, shares) in enumerate(parts.items()):
        start = 0.0
        for label, milliseconds, color in shares:
            if not milliseconds:
                continue
            axes.barh(place, milliseconds, left=start, color=color, label=label)
            start += milliseconds
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_title("step of the slowest rank, by what may bound it", loc="left")
    axes.set_xlabel("ms")
    _list_below(axes, reverse=False)


def _fill(axes, below: Sequence[float], above: Sequence[float], *, color: str, label: str) -> None:
    """Draw an amount of every rank, on top of another; nothing where there is none."""
    if max(above, default=0.0) <= 0 or list(below) == list(above):
        return
    if len(below) <= APART:
        heights = [high - low for low, high in zip(below, above, strict=True)]
        axes.bar(range(len(below)), heights, bottom=below, color=color, label=label, width=0.8)
        return
    edges = [rank - 0.5 for rank in range(len(below) + 1)]
    axes.fill_between(
        edges,
        [*below, below[-1]],
        [*above, above[-1]],
        step="post",
        color=color,
        label=label,
        linewidth=0,
    )


def _finish(axes, ranks: int) -> None:
    """Set the limits, number ranks, and list what is seen, the highest first."""
    axes.set_xlim(-0.5, ranks - 0.5)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("rank")
    if ranks <= APART:
        axes.set_xticks(range(ranks))
    _list_below(axes, reverse=True)


def _list_below(axes, *, reverse: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    order = slice(None, None, -1 if reverse else 1)
    axes.figure.legend(
        handles[order], labels[order], loc="outside lower center", fontsize=SMALL, ncols=2
    )
