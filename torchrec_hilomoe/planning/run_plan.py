"""``RunPlan``: what a run needs on some machines, and the report that says so to people."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torchrec_hilomoe.planning.activations import Activations
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.memory import DenseMemory, RankMemory
from torchrec_hilomoe.planning.step import RankTime, Step
from torchrec_hilomoe.runtime.console import counted, format_bytes
from torchrec_hilomoe.runtime.paths import to_json
from torchrec_hilomoe.training.sharding.plan_report import PlanReport

__all__ = ["RankPlan", "RunPlan", "plan_text"]

SHOWN_GROUPS = 12
HEADINGS = ("ranks", "tables*", "their state*", "caches~", "lookups~", "dense*", "saved*", "all")
LEGEND = "  * counted exactly   ~ TorchRec's estimator"


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part.

    Attributes:
        tables: Bytes by table that it has a shard of, with optimizer state and lookups.
        memory: Bytes of all those shards, by what they are for.
        time: Milliseconds of those shards in a micro-batch.
    """

    tables: Mapping[str, int]
    memory: RankMemory
    time: RankTime


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run needs on some machines, and how fast it should be.

    Attributes:
        cluster: Machines that were planned for.
        report: Report of where tables are.
        ranks: Plans of the ranks, in order.
        dense: Bytes of what every rank has a copy of.
        activations: Bytes that the dense part saves for its backward pass.
        rows: Rows of a rank's micro-batch.
        micro_batches: Number of micro-batches in a step.
        capacity: Bytes of a device, headroom included.
        reserved: Share of a device's memory that the planner leaves to all but tables.
        step: Estimated time of a step.
        assumptions: Values that were assumed because they were not given, by name.
    """

    cluster: Cluster
    report: PlanReport
    ranks: tuple[RankPlan, ...]
    dense: DenseMemory
    activations: Activations
    rows: int
    micro_batches: int
    capacity: int
    reserved: float
    step: Step
    assumptions: Mapping[str, str]

    @property
    def usable(self) -> int:
        """Bytes of a device without the headroom."""
        return int(self.capacity * (1 - self.cluster.headroom))

    @property
    def fullest(self) -> int:
        """The rank that needs most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].memory.device)

    def needed(self, rank: int) -> int:
        """Bytes of the device's memory that a rank needs in all."""
        saved = self.activations.bytes(self.rows)
        return self.ranks[rank].memory.device + self.dense.total + saved

    @property
    def excess(self) -> int:
        """Bytes by which the fullest rank needs more than is usable; below 0 it fits."""
        return self.needed(self.fullest) - self.usable

    @property
    def largest_rows(self) -> int:
        """The largest micro-batch of a rank that fits with these shards; 0 if none does."""
        left_to_tables = self.capacity * (1 - self.reserved)
        limits = []
        for rank in self.ranks:
            fixed = rank.memory.device - rank.memory.lookups
            moving = rank.memory.lookups / self.rows
            rest = self.usable - fixed - self.dense.total - self.activations.fixed
            limits.append(rest / (moving + self.activations.per_row))
            if moving:
                limits.append((left_to_tables - fixed) / moving)
        return max(0, int(min(limits)))

    @property
    def largest_batch(self) -> int:
        """The same as a global batch."""
        return self.largest_rows * self.cluster.world_size * self.micro_batches

    @property
    def imbalance(self) -> dict[str, float]:
        """The worst rank over the mean, of memory and of time; 1 where all have the same."""
        memory = [rank.memory.device for rank in self.ranks]
        time = [rank.time.total for rank in self.ranks]
        return {
            name: max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
            for name, loads in (("memory", memory), ("time", time))
        }

    def to_json(self) -> str:
        """All of it, derived figures too."""
        step = asdict(self.step) | {
            "bound": self.step.bound,
            "milliseconds_if_all_overlaps": self.step.overlapped,
            "milliseconds_if_nothing_does": self.step.serial,
        }
        raw: dict[str, Any] = asdict(self) | {
            "step": step,
            "usable": self.usable,
            "fits": self.excess <= 0,
            "excess": max(0, self.excess),
            "needed": [self.needed(rank) for rank in range(len(self.ranks))],
            "imbalance": self.imbalance,
            "largest_rows": self.largest_rows,
            "largest_batch": self.largest_batch,
        }
        return to_json(raw) + "\n"


def plan_text(plan: RunPlan) -> str:
    """Return the plan in lines for people, which say who counted or estimated each figure."""
    cluster = plan.cluster
    lines = [
        f"{counted(cluster.world_size, 'rank')} on {counted(cluster.hosts, 'host')}, "
        f"{cluster.device}, {format_bytes(plan.capacity)} a device",
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
    return (name, *map(format_bytes, figures))


def _dense(plan: RunPlan) -> Iterator[str]:
    dense = plan.dense
    yield (
        f"  dense: parameters {format_bytes(dense.parameters)}, gradients "
        f"{format_bytes(dense.gradients)}, optimizers {format_bytes(dense.state)}; saved for the "
        f"backward pass: {format_bytes(plan.activations.per_row)} a row, what kernels allocate for "
        "a moment not counted"
    )
    most = max(rank.memory.host for rank in plan.ranks)
    if most:
        yield f"  besides, in host memory, at most {format_bytes(most)} of tables and their state*"


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
        f"{format_bytes(plan.usable)} of its {format_bytes(plan.capacity)} "
        f"(--headroom {plan.cluster.headroom})"
    )
    needed = format_bytes(plan.needed(rank))
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
        f"It does NOT fit: rank {rank} needs {needed}, {format_bytes(plan.excess)} more than "
        f"{usable}. The most is {part}, {format_bytes(parts[name])}."
    )
    if not plan.largest_rows:
        yield "No batch fits with these shards."
        return
    micro_batches = -(-plan.rows * plan.micro_batches // plan.largest_rows)
    option = f"--train.gradient_accumulation_steps {micro_batches}"
    yield f"{largest} {option} keeps the batch and needs less at a time."
