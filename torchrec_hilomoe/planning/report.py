"""A :class:`RunPlan` as lines for people, which say who counted or estimated each figure."""

from collections.abc import Iterator
from itertools import groupby

from torchrec_hilomoe.planning.run_plan import RankPlan, RunPlan
from torchrec_hilomoe.runtime.console import counted
from torchrec_hilomoe.training.sharding.report import shown_bytes

__all__ = ["plan_text"]

SHOWN_GROUPS = 12
HEADINGS = ("ranks", "tables*", "their state*", "caches~", "lookups~", "dense*", "saved*", "all")
LEGEND = "  * counted exactly   ~ TorchRec's estimator"


def plan_text(plan: RunPlan) -> str:
    """Return the report."""
    cluster = plan.cluster
    lines = [
        f"{counted(cluster.world_size, 'rank')} on {counted(cluster.hosts, 'host')}, "
        f"{cluster.device}, {shown_bytes(plan.capacity)} a device",
        f"{counted(plan.step.samples, 'row')} in a step: {plan.rows:,} on each rank"
        + (f", {plan.micro_batches} times" if plan.micro_batches > 1 else ""),
        "",
        "Tables (memory and time of all by TorchRec's estimator)",
        *(f"  {line}" for line in plan.report.table_lines()),
        "",
        "Memory of a rank",
        *_memory(plan),
        LEGEND,
        *_dense(plan),
        f"  imbalance, the worst rank over the mean: memory {plan.imbalance['memory']:.2f}, time "
        f"{plan.imbalance['time']:.2f}",
        "",
        "A step",
        *_step(plan),
        "",
        *_fit(plan),
        "",
        "Assumed",
        *(f"  {name}: {value}" for name, value in plan.assumptions.items()),
    ]
    return "\n".join(lines) + "\n"


def _memory(plan: RunPlan) -> Iterator[str]:
    """A line for each run of ranks that hold the same, the fullest first if there are many."""
    groups = []
    same = groupby(range(len(plan.ranks)), key=lambda rank: _load(plan.ranks[rank]))
    for _, members in same:
        ranks = list(members)
        groups.append((ranks[0], ranks[-1]))
    shown = groups
    if len(groups) > SHOWN_GROUPS:
        fullest = sorted(groups, key=lambda group: -plan.needed(group[0]))[:SHOWN_GROUPS]
        shown = sorted(fullest)
    cells = [HEADINGS, *(_cells(plan, first, last) for first, last in shown)]
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"0 B"}]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        yield "  " + "  ".join(map(str.rjust, row, widths))
    if len(groups) > len(shown):
        yield f"  and {len(groups) - len(shown)} more groups of ranks that need less"


def _load(rank: RankPlan) -> tuple[int, ...]:
    memory = rank.memory
    return memory.tables, memory.state, memory.caches, memory.lookups, memory.host


def _cells(plan: RunPlan, first: int, last: int) -> tuple[str, ...]:
    memory = plan.ranks[first].memory
    figures = (
        memory.tables,
        memory.state,
        memory.caches,
        memory.lookups,
        plan.dense.total,
        plan.activations.bytes(plan.rows),
        plan.needed(first),
    )
    name = f"{first}" if first == last else f"{first}-{last}"
    return (name, *map(shown_bytes, figures))


def _dense(plan: RunPlan) -> Iterator[str]:
    dense = plan.dense
    yield (
        f"  dense: parameters {shown_bytes(dense.parameters)}, gradients "
        f"{shown_bytes(dense.gradients)}, optimizers {shown_bytes(dense.state)}; saved for the "
        f"backward pass: {shown_bytes(plan.activations.per_row)} a row, what kernels allocate for "
        "a moment not counted"
    )
    most = max(rank.memory.host for rank in plan.ranks)
    if most:
        yield f"  besides, in host memory, at most {shown_bytes(most)} of tables and their state*"


def _step(plan: RunPlan) -> Iterator[str]:
    step = plan.step
    rows = (
        ("memory", "lookup and update of rows, slowest rank", step.lookup, "TorchRec's estimator"),
        ("", "dense part's traffic, at the least", step.dense_memory, "bytes / bandwidth"),
        ("network", "vectors and gradients, slowest rank", step.exchange, "TorchRec's estimator"),
        ("", "all-reduce of dense gradients", step.all_reduce, "ring, bytes / bandwidth"),
        ("compute", "dense part's products", step.compute, "counted FLOPs / FLOP/s reached"),
    )
    for resource, what, milliseconds, whose in rows:
        yield f"  {resource:<8} {what:<40} {milliseconds:>10.3f} ms  {whose}"
    rate = [step.samples / time * 1e3 for time in (step.serial, step.overlapped)]
    yield (
        f"  bound by {step.bound}: {step.overlapped:.3f} ms if all overlaps, {step.serial:.3f} ms "
        f"if nothing does; {rate[0]:,.0f} to {rate[1]:,.0f} samples a second"
    )


def _fit(plan: RunPlan) -> Iterator[str]:
    rank = plan.fullest
    usable = (
        f"{shown_bytes(plan.usable)} of its {shown_bytes(plan.capacity)} "
        f"(--headroom {plan.cluster.headroom})"
    )
    needed = shown_bytes(plan.needed(rank))
    largest = (
        f"The largest batch that fits with these shards: {plan.largest_batch:,} rows, "
        f"{plan.largest_rows:,} on each rank."
    )
    if plan.excess <= 0:
        yield f"It fits: rank {rank} needs most, {needed}, and may use {usable}. {largest}"
        return
    parts = dict(plan.ranks[rank].tables)
    parts["what the dense part saves"] = plan.activations.bytes(plan.rows)
    parts["the dense part"] = plan.dense.total
    name = max(parts, key=lambda part: parts[part])
    part = f"table {name!r}" if name in plan.ranks[rank].tables else name
    yield (
        f"It does NOT fit: rank {rank} needs {needed}, {shown_bytes(plan.excess)} more than "
        f"{usable}. The most is {part}, {shown_bytes(parts[name])}."
    )
    if not plan.largest_rows:
        yield "No batch fits with these shards."
        return
    micro_batches = -(-plan.rows * plan.micro_batches // plan.largest_rows)
    yield f"{largest} --train.accumulate {micro_batches} keeps the batch and needs less at a time."
