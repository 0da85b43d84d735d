"""Configuration and machines -> :class:`RunPlan`: where tables go, what fits and how fast it is.

The plan is the one that training makes on such machines. No process group, no table and no GPU is
needed for it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.config.sharding import parse_bytes
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task, with_widest_views
from torchrec_hilomoe.models.flops import count_cost
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.planning.activations import saved_activations
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.memory import dense_memory, RankMemory, table_memory
from torchrec_hilomoe.planning.run_plan import RankPlan, RunPlan
from torchrec_hilomoe.planning.step import DenseWork, estimate_step, rank_times
from torchrec_hilomoe.training.inputs import schedule_of
from torchrec_hilomoe.training.optimizers.precision import DTYPES
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.sharding.planner import make_plan, PlannerResult
from torchrec_hilomoe.training.sharding.shard import fuse_table_optimizer, ids_of_a_row

__all__ = ["plan_run", "planned_task", "with_rows"]


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
    found = make_plan(
        task, cluster.machine, config.sharding, batch_size=rows, lengths=ids_of_a_row(schema)
    )
    parts = table_memory(
        found.best_plan,
        found.estimated_for(task, 2 * rows),
        task.model.sparse,
        device=cluster.device,
        optimizer=config.train.table_optimizer,
    )
    times = rank_times(found.best_plan, cluster.world_size)
    names = [option.name for option in found.best_plan]
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
        micro_batches=train.gradient_accumulation_steps,
        samples=rows * cluster.world_size * train.gradient_accumulation_steps,
    )
    return RunPlan(
        cluster=cluster,
        report=found.report,
        ranks=tuple(ranks),
        dense=dense,
        activations=activations,
        rows=rows,
        micro_batches=train.gradient_accumulation_steps,
        capacity=_capacity(config, cluster, found),
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
    task = build_task(with_widest_views(config.model, schema), schema)
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
        if tables[table] < 1:
            raise ValueError(f"--rows {size}: a table has at least one row.")
    return replace(schema, tables=tables)


def _capacity(config: RunConfig, cluster: Cluster, found: PlannerResult) -> int:
    """Bytes of a device."""
    on_gpu, sharding = cluster.device == "cuda", config.sharding
    given = sharding.hbm if on_gpu else sharding.ddr
    if given is not None:
        return parse_bytes(given, "sharding.hbm" if on_gpu else "sharding.ddr")
    return round(found.topology.devices[0].storage.ddr / (1 - sharding.reserve))


def _assumptions(
    config: RunConfig, cluster: Cluster, found: PlannerResult, peak: float
) -> dict[str, str]:
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
