"""What would help where tables do not fit: each remedy is tried, by planning with it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from torchrec_hilomoe.config import RunConfig, TableSharding
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run, planned_task
from torchrec_hilomoe.planning.run_plan import RunPlan
from torchrec_hilomoe.planning.shortage import Shortage, shortage_of
from torchrec_hilomoe.training.sharding.failure import NoPlanError
from torchrec_hilomoe.training.sharding.planner import find_plan
from torchrec_hilomoe.training.sharding.report import shown_bytes
from torchrec_hilomoe.training.sharding.shard import ids_of_a_row

__all__ = ["explain", "plan_or_explain"]

PATIENCE = 60.0  # seconds after which no further remedy is tried


@dataclass(frozen=True, kw_only=True)
class _Remedy:
    """Something to try: what the user would write, and what that means.

    Attributes:
        text: The options.
        config: With them.
        cluster: With them.
        hopeless: Whether it need not be tried, because it leaves too little by far.
    """

    text: str
    config: RunConfig
    cluster: Cluster
    hopeless: bool = False


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
            if not remedy.hopeless and time.monotonic() > end:
                untried.append(remedy.text)
                break
            if not remedy.hopeless and _fits(remedy, schema):
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

    def changed(text: str, *, hopeless: bool = False, **parts) -> _Remedy:
        changes = replace(config, **parts)
        return _Remedy(text=text, config=changes, cluster=cluster, hopeless=hopeless)

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
        changed(
            f"--sharding.reserve {share}",
            hopeless=short.per_rank > short.limit * (1 - share) / (1 - sharding.reserve),
            sharding=replace(sharding, reserve=share),
        )
        for share in lower
    ]
    if cluster.device == "cuda" and not short.host:
        option = f'{where} \'{{"kernel": "fused_uvm_caching"}}\', rows in host memory and slower'
        yield [placed(option, TableSharding(kernel="fused_uvm_caching"))]
    yield list(_more_memory(short, config, cluster))
    yield list(_more_ranks(short, config, cluster))
    narrower = [width for width in (model.embedding_dim // 2, model.embedding_dim // 4) if width]
    yield [
        changed(
            f"--model.embedding_dim {width}",
            hopeless=short.per_rank * width / model.embedding_dim > short.limit,
            model=replace(model, embedding_dim=width),
        )
        for width in narrower
        if width % 4 == 0
    ]
    least = cluster.world_size * train.accumulate
    smaller = [train.batch_size // factor for factor in (2, 4, 8)]
    yield [
        changed(
            f"--train.batch_size {rows}",
            hopeless=short.rows_per_rank > short.limit,
            train=replace(train, batch_size=rows),
        )
        for rows in smaller
        if rows >= least
    ]


def _more_memory(short: Shortage, config: RunConfig, cluster: Cluster) -> Iterator[_Remedy]:
    sharding = config.sharding
    option = "hbm" if cluster.device == "cuda" and not short.host else "ddr"
    least = short.per_rank / (1 - sharding.reserve)
    units = (("GB", 2**30), ("MB", 2**20), ("KB", 2**10))
    unit, scale = next((it for it in units if least > 10 * it[1]), units[-1])
    for factor in (1.0, 1.25, 1.5, 2.0):
        text = f"{ceil(least * factor / scale)}{unit}"
        yield _Remedy(
            text=f"--{option} {text}",
            config=replace(config, sharding=replace(sharding, **{option: text})),
            cluster=cluster,
        )


def _more_ranks(short: Shortage, config: RunConfig, cluster: Cluster) -> Iterator[_Remedy]:
    for factor in (2, 4, 8):
        more = replace(
            cluster, world_size=cluster.world_size * factor, hosts=cluster.hosts * factor
        )
        if config.train.batch_size >= more.world_size * config.train.accumulate:
            text = f"--world_size {more.world_size} --hosts {more.hosts}"
            hopeless = short.per_rank / factor > short.limit
            yield _Remedy(text=text, config=config, cluster=more, hopeless=hopeless)
