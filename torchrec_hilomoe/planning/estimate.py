"""Configuration and machines -> :class:`RunPlan`: where tables go, what fits and how fast it is.

The plan is the one that training makes on such machines. No process group, no table and no GPU is
needed for it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import count_cost
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.planning.activations import Activations, saved_activations
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.memory import dense_memory, DenseMemory, RankMemory, table_memory
from torchrec_hilomoe.planning.step import DenseWork, estimate_step, rank_times, RankTime, Step
from torchrec_hilomoe.training.capabilities import check_capabilities
from torchrec_hilomoe.training.inputs import schedule_of
from torchrec_hilomoe.training.plan_report import PlanReport
from torchrec_hilomoe.training.planner import find_plan, Found
from torchrec_hilomoe.training.precision import DTYPES
from torchrec_hilomoe.training.sharding import fuse_table_optimizer, ids_of_a_row

__all__ = ["RankPlan", "RunPlan", "plan_run", "planned_task", "with_rows"]


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part.

    Attributes:
        tables: Of which it has a shard: bytes of its part, optimizer state and lookups included.
        memory: Of all those shards.
        time: Of a micro-batch.
    """

    tables: Mapping[str, int]
    memory: RankMemory
    time: RankTime


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run needs on some machines, and how fast it should be.

    Attributes:
        cluster: The machines.
        report: Where tables are.
        ranks: In order.
        dense: What every rank has a copy of.
        activations: What the dense part saves for its backward pass.
        rows: Of a rank's micro-batch.
        micro_batches: Of a step.
        capacity: Bytes of a device, headroom included.
        reserved: Share of it that the planner leaves to all but tables.
        step: How long one takes.
        assumptions: What was not given and what was taken for it, by name.
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
        return json.dumps(raw, indent=2) + "\n"


def plan_run(config: RunConfig, schema: Schema, cluster: Cluster) -> RunPlan:
    """Plan and estimate.

    Args:
        config: The run.
        schema: Of its data.
        cluster: Where it would run.

    Raises:
        NoPlanError: If the tables do not fit.
        ValueError: If the configuration is impossible there.
    """
    cluster.check(config)
    rows = cluster.rows(config)
    task = planned_task(config, schema, cluster)
    found = find_plan(
        task, cluster.machine, config.sharding, batch_size=rows, lengths=ids_of_a_row(schema)
    )
    parts = table_memory(
        found.chosen,
        found.estimated_for(task, 2 * rows),
        task.model.sparse,
        device=cluster.device,
        optimizer=config.train.table_optimizer,
    )
    times = rank_times(found.chosen, cluster.world_size)
    names = [option.name for option in found.chosen]
    ranks = []
    for rank in range(cluster.world_size):
        held = {n: part[rank] for n, part in zip(names, parts, strict=True) if rank in part}
        ranks.append(
            RankPlan(
                tables={name: memory.device + memory.host for name, memory in held.items()},
                memory=sum(held.values(), RankMemory()),
                time=times[rank],
            )
        )
    train, backbone, widths = config.train, task.model.backbone, task.model.sparse.widths
    dense = dense_memory(task, config)
    activations = saved_activations(backbone, widths, DTYPES[train.precision])
    peak = cluster.peak_flops(train.precision)
    cost = count_cost(task, schema, config.model.embedding_dim)
    step = estimate_step(
        times,
        DenseWork(
            flops=rows * cost.flops["total"],
            saved_bytes=activations.bytes(rows),
            resident_bytes=dense.total,
            gradient_bytes=dense.gradients,
        ),
        cluster,
        found.topology,
        peak_flops=peak,
        micro_batches=train.accumulate,
        samples=rows * cluster.world_size * train.accumulate,
    )
    left = 1 - config.sharding.reserve
    storage = found.topology.devices[0].storage
    return RunPlan(
        cluster=cluster,
        report=found.planned.report,
        ranks=tuple(ranks),
        dense=dense,
        activations=activations,
        rows=rows,
        micro_batches=train.accumulate,
        capacity=round((storage.hbm if cluster.device == "cuda" else storage.ddr) / left),
        reserved=config.sharding.reserve,
        step=step,
        assumptions=_assumptions(config, cluster, found, peak),
    )


def planned_task(config: RunConfig, schema: Schema, cluster: Cluster) -> TrainTask:
    """The model as training plans it: tables without memory, their optimizer known.

    Raises:
        ValueError: If the model is impossible, or what is asked for on that device.
    """
    check_capabilities(config.train, schedule_of(config).stages, cluster.device)
    torch.manual_seed(config.seed)
    task = build_task(config.model, schema)
    fuse_table_optimizer(task.model.sparse, config.train)
    return task


def with_rows(schema: Schema, sizes: Sequence[str]) -> Schema:
    """The schema with other sizes of some tables.

    Args:
        schema: Of the data.
        sizes: Each ``TABLE=ROWS``, such as ``item=1e10``.

    Raises:
        ValueError: If there is no such table, or a size is none.
    """
    tables = dict(schema.tables)
    for size in sizes:
        table, _, rows = size.partition("=")
        if table not in tables:
            raise ValueError(
                f"--rows {size}: there is no table {table!r}, only {', '.join(tables)}."
            )
        try:
            tables[table] = int(float(rows))
        except (ValueError, OverflowError):
            raise ValueError(f"--rows {size}: write it as {table}=10000000 or 1e7.") from None
    return replace(schema, tables=tables)


def _assumptions(config: RunConfig, cluster: Cluster, found: Found, peak: float) -> dict[str, str]:
    """What the figures rest on."""
    topology, sharding, given = found.topology, config.sharding, "given"
    default = "TorchRec's default"
    per_second = 1000 / 2**30
    links = {
        "memory bandwidth": (
            topology.hbm_mem_bw if cluster.device == "cuda" else topology.ddr_mem_bw,
            sharding.hbm_bandwidth if cluster.device == "cuda" else sharding.ddr_bandwidth,
        ),
        "bandwidth within a host": (topology.intra_host_bw, sharding.intra_host_bandwidth),
        "bandwidth between hosts": (topology.inter_host_bw, sharding.inter_host_bandwidth),
    }
    said = {
        name: f"{value * per_second:,.1f} GB/s ({default if wanted is None else given})"
        for name, (value, wanted) in links.items()
    }
    whence = "assumed" if cluster.device_flops is None else given
    said["peak of a device"] = (
        f"{peak / 1e12:,.1f} TFLOP/s in {config.train.precision} ({whence}), of which "
        f"{cluster.utilization:.0%} are reached"
    )
    if sharding.ddr is None:
        said["host memory of a rank"] = "this machine's over the ranks of a host"
    said["histories"] = "full, the most that the schema allows"
    return said
