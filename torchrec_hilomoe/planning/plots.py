"""A plan as a picture: memory and time of every rank, and what bounds a step. Extra ``plots``."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_hilomoe.planning.run_plan import RunPlan

__all__ = ["draw_plan"]

NAMED = 8  # tables with a colour of their own; the others share one
OTHERS = "other tables"
GIGABYTE = 2**30
MEGABYTE = 2**20


def draw_plan(plan: RunPlan, file: Path | str) -> None:
    """Draw memory and estimated time by rank, and the step.

    Args:
        plan: What to draw.
        file: Where to write the PNG; its folder is made if it does not exist.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_plan needs matplotlib: pip install 'torchrec-hilomoe[plots]'"
        ) from error

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 9), layout="constrained")
    memory, time, step = figure.subplots(3, 1, height_ratios=[3, 2, 1.4])
    cluster = plan.cluster
    fits = "fits" if plan.excess <= 0 else "does NOT fit"
    figure.suptitle(
        f"{cluster.world_size} ranks on {cluster.hosts} hosts, {plan.step.samples:,} rows a step: "
        f"{fits}, bound by {plan.step.bound}"
    )
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    _draw_step(step, plan)
    figure.savefig(file, dpi=120)


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
    colors = ["0.55", "0.8", *(f"C{i}" for i in range(10))]
    below = [0.0] * len(plan.ranks)
    for color, (label, amounts) in zip(colors, layers.items(), strict=False):
        above = [low + amount / unit for low, amount in zip(below, amounts, strict=True)]
        _fill(axes, below, above, color=color, label=label)
        below = above
    axes.set_ylabel(f"device memory, {name}")
    if plan.usable < 20 * highest:
        axes.axhline(plan.capacity / unit, color="black", label="a device's memory")
        axes.axhline(plan.usable / unit, color="black", linestyle=":", label="less headroom")
    else:
        axes.set_title(f"of {plan.capacity / unit:,.1f} {name} a device", loc="right", fontsize=9)
    axes.set_xlim(-0.5, len(plan.ranks) - 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_time(axes, plan: RunPlan) -> None:
    lookup = [rank.time.lookup for rank in plan.ranks]
    both = [rank.time.total for rank in plan.ranks]
    _fill(axes, [0.0] * len(lookup), lookup, color="C0", label="lookup and update")
    _fill(axes, lookup, both, color="C1", label="exchange")
    axes.axhline(sum(both) / len(both), color="black", linestyle=":", label="mean")
    axes.set_ylabel("est. ms a micro-batch")
    axes.set_xlabel("rank")
    axes.set_xlim(-0.5, len(plan.ranks) - 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_step(axes, plan: RunPlan) -> None:
    step = plan.step
    parts = {
        "memory": (
            ("lookup and update", step.lookup, "C0"),
            ("dense traffic", step.dense_memory, "0.55"),
        ),
        "network": (("exchange", step.exchange, "C1"), ("all-reduce", step.all_reduce, "C2")),
        "compute": (("products", step.compute, "C3"),),
    }
    for place, (_, shares) in enumerate(parts.items()):
        start = 0.0
        for label, milliseconds, color in shares:
            axes.barh(place, milliseconds, left=start, color=color, label=label)
            start += milliseconds
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step, slowest rank")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _fill(axes, below: list[float], above: list[float], *, color: str, label: str) -> None:
    """A band over ranks; a step for each, however many there are."""
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
