"""Why tables do not fit: which, by how much, and what would help, each remedy tried by planning."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from torchrec.distributed.planner.types import ShardingOption, Storage, Topology

from torchrec_hilomoe.config import RunConfig, TableSharding
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run, planned_task, RunPlan
from torchrec_hilomoe.training.plan_failure import NoPlanError
from torchrec_hilomoe.training.plan_report import shown_bytes
from torchrec_hilomoe.training.planner import find_plan
from torchrec_hilomoe.training.sharding import ids_of_a_row

__all__ = ["Shortage", "explain", "plan_or_explain", "shortage_of"]

PATIENCE = 60.0  # seconds after which no further remedy is tried


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """By how much tables do not fit.

    Attributes:
        table: The one that alone is too large for a rank however it is cut, or the largest.
        alone: Whether it is too large alone.
        way: How it is cut where it needs least.
        needed: Bytes: of a rank for that table, or of all ranks for all tables.
        available: Bytes: of a rank, or of all ranks, for tables.
        per_rank: Bytes that a rank must have for tables, at the least.
        host: Whether it is the host's memory that is short.
    """

    table: str
    alone: bool
    way: str
    needed: int
    available: int
    per_rank: int
    host: bool

    @property
    def excess(self) -> int:
        """Bytes that are missing; not above 0 where there is room and only no place."""
        return self.needed - self.available


@dataclass(frozen=True, kw_only=True)
class _Remedy:
    """Something to try: what the user would write, and what that means."""

    text: str
    config: RunConfig
    cluster: Cluster


def shortage_of(ways: Sequence[ShardingOption], topology: Topology) -> Shortage:
    """Find the table that is short, from all ways of cutting each."""
    capacity = topology.devices[0].storage
    by_table: dict[str, list[ShardingOption]] = {}
    for way in ways:
        by_table.setdefault(way.name, []).append(way)
    smallest = [
        min(options, key=lambda way: _total(way, topology)) for options in by_table.values()
    ]
    together = sum(_total(way, topology) for way in smallest)
    share = -(-together // topology.world_size)
    alone = []
    for table, options in by_table.items():
        best = min(options, key=lambda way: max(_missing(way, capacity)))
        on_device, on_host = _missing(best, capacity)
        host = on_host > on_device
        available = capacity.ddr if host else capacity.hbm
        missing = max(on_device, on_host)
        alone.append(
            Shortage(
                table=table,
                alone=True,
                way=best.sharding_type,
                needed=available + missing,
                available=available,
                per_rank=max(available + missing, share),
                host=host,
            )
        )
    worst = max(alone, key=lambda it: it.excess)
    if worst.excess > 0:
        return worst
    largest = max(smallest, key=lambda way: _total(way, topology))
    host = topology.compute_device == "cpu" or not largest.total_storage.hbm
    return Shortage(
        table=largest.name,
        alone=False,
        way=largest.sharding_type,
        needed=together,
        available=topology.world_size * (capacity.ddr if host else capacity.hbm),
        per_rank=max(share, *(it.needed for it in alone)),
        host=host,
    )


def plan_or_explain(config: RunConfig, schema: Schema, cluster: Cluster) -> RunPlan | str:
    """Plan, or say why there is no plan; arguments and errors as of :func:`plan_run`."""
    try:
        return plan_run(config, schema, cluster)
    except NoPlanError as error:
        return explain(error, config, schema, cluster)


def explain(error: NoPlanError, config: RunConfig, schema: Schema, cluster: Cluster) -> str:
    """Say which table does not fit, by how much, and which remedies were found to help."""
    short = shortage_of(error.ways, error.topology)
    size = next(way.tensor.shape for way in error.ways if way.name == short.table)
    table = f"table {short.table!r} ({size[0]:,} rows of {size[1]})"
    memory = "host memory" if short.host else "memory"
    for_tables = f"less sharding.reserve = {config.sharding.reserve}"
    if short.alone:
        lines = [
            f"It does NOT fit: {table} needs {shown_bytes(short.needed)} of {memory} on one rank "
            f"even when it is cut {short.way}, {shown_bytes(short.excess)} more than the "
            f"{shown_bytes(short.available)} that a rank has for tables ({for_tables})."
        ]
    else:
        over = (
            f"{shown_bytes(short.excess)} more than"
            if short.excess > 0
            else "and no way was found to place them all in"
        )
        lines = [
            f"It does NOT fit: the tables need {shown_bytes(short.needed)} of {memory} together, "
            f"{over} the {shown_bytes(short.available)} that {cluster.world_size} ranks have for "
            f"tables ({for_tables}). The largest is {table}."
        ]
    helped, failed, untried = _try_all(short, config, schema, cluster)
    lines += ["What would help, each tried alone:", *(f"  {text}" for text in helped)]
    if not helped:
        lines.append("  none of what was tried")
    if failed:
        lines.append(f"What would not: {'; '.join(failed)}.")
    if untried:
        lines.append(f"Not tried, because the others took long: {'; '.join(untried)}.")
    return "\n".join(lines)


def _missing(way: ShardingOption, capacity: Storage) -> tuple[int, int]:
    """Bytes by which the largest shard exceeds the device's memory, and the host's."""
    storages = [shard.storage for shard in way.shards if shard.storage is not None]
    device = max(storage.hbm for storage in storages) - capacity.hbm
    return device, max(storage.ddr for storage in storages) - capacity.ddr


def _total(way: ShardingOption, topology: Topology) -> int:
    storage = way.total_storage
    return storage.ddr if topology.compute_device == "cpu" or not storage.hbm else storage.hbm


def _try_all(
    short: Shortage, config: RunConfig, schema: Schema, cluster: Cluster
) -> tuple[list[str], ...]:
    """Return what helps, what does not, and what was not tried."""
    helped: list[str] = []
    failed: list[str] = []
    untried: list[str] = []
    end = time.monotonic() + PATIENCE
    for series in _remedies(short, config, cluster):
        for remedy in series:
            if time.monotonic() > end:
                untried.append(remedy.text)
                break
            if _fits(remedy, schema):
                helped.append(remedy.text)
                break
        else:
            if series:
                failed.append(series[-1].text)
    return helped, failed, untried


def _fits(remedy: _Remedy, schema: Schema) -> bool:
    task = planned_task(remedy.config, schema, remedy.cluster)
    try:
        find_plan(
            task,
            remedy.cluster.machine,
            remedy.config.sharding,
            batch_size=remedy.cluster.rows(remedy.config),
            lengths=ids_of_a_row(schema),
        )
    except NoPlanError:
        return False
    return True


def _remedies(short: Shortage, config: RunConfig, cluster: Cluster) -> Iterator[list[_Remedy]]:
    """Yield series of remedies, each from the least to the most that is asked of the user."""
    sharding, train, model = config.sharding, config.train, config.model
    where, table = f"--sharding.tables.{short.table}", short.table

    def changed(text: str, **parts) -> _Remedy:
        return _Remedy(text=text, config=replace(config, **parts), cluster=cluster)

    def placed(text: str, how: TableSharding | None) -> _Remedy:
        others = {name: it for name, it in sharding.tables.items() if name != table}
        tables = others if how is None else others | {table: how}
        return changed(text, sharding=replace(sharding, tables=tables))

    if table in sharding.tables:
        yield [placed(f"no constraint on {table} ({where})", None)]
    if train.table_optimizer != "rowwise_adagrad":
        option = "--train.table_optimizer rowwise_adagrad"
        yield [changed(option, train=replace(train, table_optimizer="rowwise_adagrad"))]
    lower = [share for share in (0.3, 0.2, 0.1) if share < sharding.reserve]
    yield [
        changed(f"--sharding.reserve {share}", sharding=replace(sharding, reserve=share))
        for share in lower
    ]
    if cluster.device == "cuda" and not short.host:
        option = f'{where} \'{{"kernel": "fused_uvm_caching"}}\', rows in host memory and slower'
        yield [placed(option, TableSharding(kernel="fused_uvm_caching"))]
    yield list(_more_memory(short, config, cluster))
    yield list(_more_ranks(config, cluster))
    narrower = [width for width in (model.embedding_dim // 2, model.embedding_dim // 4) if width]
    yield [
        changed(f"--model.embedding_dim {width}", model=replace(model, embedding_dim=width))
        for width in narrower
        if width % 4 == 0
    ]
    least = cluster.world_size * train.accumulate
    smaller = [train.batch_size // factor for factor in (2, 4, 8)]
    yield [
        changed(f"--train.batch_size {rows}", train=replace(train, batch_size=rows))
        for rows in smaller
        if rows >= least
    ]


def _more_memory(short: Shortage, config: RunConfig, cluster: Cluster) -> Iterator[_Remedy]:
    sharding = config.sharding
    option = "hbm" if cluster.device == "cuda" and not short.host else "ddr"
    least = short.per_rank / (1 - sharding.reserve)
    unit, scale = ("GB", 2**30) if least > 10 * 2**30 else ("KB", 2**10)
    for factor in (1.0, 1.25, 1.5, 2.0):
        text = f"{ceil(least * factor / scale)}{unit}"
        yield _Remedy(
            text=f"--{option} {text}",
            config=replace(config, sharding=replace(sharding, **{option: text})),
            cluster=cluster,
        )


def _more_ranks(config: RunConfig, cluster: Cluster) -> Iterator[_Remedy]:
    for factor in (2, 4, 8):
        more = replace(
            cluster, world_size=cluster.world_size * factor, hosts=cluster.hosts * factor
        )
        if config.train.batch_size >= more.world_size * config.train.accumulate:
            text = f"--world_size {more.world_size} --hosts {more.hosts}"
            yield _Remedy(text=text, config=config, cluster=more)
