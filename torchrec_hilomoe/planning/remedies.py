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
from torchrec_hilomoe.training.sharding.planner import make_plan
from torchrec_hilomoe.training.sharding.shard import ids_of_a_row
from torchrec_hilomoe.training.sharding.shortage import NoPlanError, Shortage

__all__ = ["plan_or_explain"]

PATIENCE = 60.0  # seconds after which no further remedy is tried


@dataclass(frozen=True, kw_only=True)
class _Remedy:
    """Something to try: what the user would write, and what that means.

    Attributes:
        text: The options.
        config: Configuration with the change.
        cluster: Machines with the change.
        hopeless: Whether it leaves too little by far, so that it need not be tried.
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
        return _explain(error.shortage, config, schema, cluster)


def _explain(short: Shortage, config: RunConfig, schema: Schema, cluster: Cluster) -> str:
    """Say what does not fit, by how much, and which remedies were found to help."""
    lines = [f"It does NOT fit: {short.text(config.sharding)}"]
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
        make_plan(
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
    least = cluster.world_size * train.gradient_accumulation_steps
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
        if config.train.batch_size >= more.world_size * config.train.gradient_accumulation_steps:
            text = f"--world_size {more.world_size} --hosts {more.hosts}"
            hopeless = short.per_rank / factor > short.limit
            yield _Remedy(text=text, config=config, cluster=more, hopeless=hopeless)
