"""Where tables go: TorchRec's planner, constrained by what a device can do and a user wants.

Every call of TorchRec's planner is in this file and its neighbours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import (
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    PlannerError,
    ShardingOption,
    Stats,
    Storage,
    Topology,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.config.sharding import ShardingConfig, TableSharding
from torchrec_hilomoe.training.sharding.capabilities import CAPABILITIES
from torchrec_hilomoe.training.sharding.failure import NoPlanError, TableNeed, why_not
from torchrec_hilomoe.training.sharding.pinning import Pinning
from torchrec_hilomoe.training.sharding.report import PlanReport, TablePlan
from torchrec_hilomoe.training.sharding.topology import topology_of
from torchrec_hilomoe.training.sharding.ways import OrderedEnumerator
from torchrec_hilomoe.training.sharding.wishes import check_tables, Machine, Table

__all__ = ["Found", "Machine", "Planned", "find_plan", "make_plan", "tables_by_module"]

# A table is only worth splitting by columns if each half still fills a few cache lines.
NARROWEST_SPLIT = 64

USUAL = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE)

# Shards that the search through all plans may place: it takes time with their number, and TorchRec
# limits only that of plans.
SEARCHED = 200_000
MOST_PLANS = 10_000  # TorchRec's own limit


@dataclass(frozen=True)
class Planned:
    """A plan, and what it looks like."""

    plan: ShardingPlan
    report: PlanReport


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plan, with all that TorchRec knows of it.

    Attributes:
        planned: The plan.
        chosen: How each table is cut, shard by shard, with TorchRec's estimates.
        topology: The machine as TorchRec was told of it, less what is reserved.
        constraints: Of each table.
    """

    planned: Planned
    chosen: list[ShardingOption]
    topology: Topology
    constraints: Mapping[str, ParameterConstraints]

    def estimated_for(self, module: nn.Module, batch_size: int) -> list[ShardingOption]:
        """The same choice with the estimates for another batch, in the same order."""
        only = {
            it.name: replace(
                self.constraints[it.name],
                sharding_types=[it.sharding_type],
                compute_kernels=[it.compute_kernel],
            )
            for it in self.chosen
        }
        enumerator = EmbeddingEnumerator(self.topology, batch_size=batch_size, constraints=only)
        ways = {way.name: way for way in enumerator.enumerate(module, get_default_sharders())}
        return [ways[it.name] for it in self.chosen]


def make_plan(
    module: nn.Module,
    machine: Machine,
    options: ShardingConfig,
    *,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
) -> Planned:
    """Plan all collections of a model together: :func:`find_plan`, and only the plan of it."""
    return find_plan(module, machine, options, batch_size=batch_size, lengths=lengths).planned


def find_plan(
    module: nn.Module,
    machine: Machine,
    options: ShardingConfig,
    *,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
) -> Found:
    """Plan all collections of a model together; needs no process group and no such machine.

    Args:
        module: The model, its tables on the ``meta`` device.
        machine: What the job runs on.
        options: What the user wants.
        batch_size: Rows of one rank in a batch, for the planner's estimates.
        lengths: Ids of a row by feature, where there may be more than one.

    Raises:
        NoPlanError: If the tables do not fit: which table, which limit, and what would help.
        ValueError: If an option names what is not there or cannot be.
    """
    tables = _tables(module)
    check_tables(tables, machine, options)
    constraints = {
        name: _constraints(table, machine, options.tables.get(name, TableSharding()), lengths or {})
        for name, table in tables.items()
    }
    topology = topology_of(machine, options)
    recorder = _Recorder()
    enumerator = OrderedEnumerator(
        EmbeddingEnumerator(topology, batch_size=batch_size, constraints=constraints)
    )
    pinned = {name: o.ranks for name, o in options.tables.items() if o.ranks is not None}
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # the topology is net of it
        proposer=[
            GridSearchProposer(min(MOST_PLANS, SEARCHED // machine.world_size)),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        partitioner=Pinning(pinned),
        stats=recorder,
    )
    sharders = get_default_sharders()
    try:
        plan = planner.plan(module, sharders)
    except PlannerError as error:
        ways = enumerator.enumerate(module, sharders)
        capacity = _bytes(topology.devices[0].storage)
        text = why_not(_needs(ways, tables), capacity, machine.world_size, options)
        raise NoPlanError(text, ways=ways, topology=topology) from error
    planned = {table for tables in tables_by_module(plan).values() for table in tables}
    missing = sorted(set(tables) ^ planned)
    if missing:
        raise ValueError(
            f"sharding: tables {', '.join(missing)} are in the model or in the plan, not in both, "
            "so that they would not be sharded. Does TorchRec shard the module that they are in?"
        )
    return Found(
        planned=Planned(plan, _report(recorder.best, topology, machine)),
        chosen=recorder.best,
        topology=topology,
        constraints=constraints,
    )


def tables_by_module(plan: ShardingPlan) -> dict[str, EmbeddingModuleShardingPlan]:
    """Return the plan of each collection."""
    return cast(dict[str, EmbeddingModuleShardingPlan], plan.plan)


def _tables(module: nn.Module) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for pooled, config in _table_configs(module):
        if config.name in tables:
            raise ValueError(
                f"sharding: table {config.name!r} is in two collections, which are planned "
                "together. Rename one."
            )
        tables[config.name] = Table(
            pooled, config.num_embeddings, config.embedding_dim, tuple(config.feature_names)
        )
    return tables


def _table_configs(module: nn.Module) -> Iterator[tuple[bool, BaseEmbeddingConfig]]:
    for collection in module.modules():
        if isinstance(collection, EmbeddingBagCollection):
            yield from ((True, config) for config in collection.embedding_bag_configs())
        elif isinstance(collection, EmbeddingCollection):
            yield from ((False, config) for config in collection.embedding_configs())


def _constraints(
    table: Table, machine: Machine, wanted: TableSharding, lengths: Mapping[str, float]
) -> ParameterConstraints:
    capability = CAPABILITIES[machine.device]
    possible = capability.pooled if table.pooled else capability.unpooled
    wide = table.width >= 2 * NARROWEST_SPLIT
    # What needs several hosts, or host memory, is for those who ask for it.
    types = [kind for kind in possible if kind in USUAL]
    chosen = [kind.value for kind in types if wide or kind is not ShardingType.COLUMN_WISE]
    min_partition = NARROWEST_SPLIT if wide else None
    if wanted.type == "column_wise" and wanted.ranks:
        min_partition = table.width // len(wanted.ranks)
    return ParameterConstraints(
        sharding_types=[wanted.type] if wanted.type else chosen,
        compute_kernels=[wanted.kernel or EmbeddingComputeKernel.FUSED.value],
        min_partition=min_partition,
        pooling_factors=[lengths.get(feature, 1.0) for feature in table.features],
    )


def _report(best: list[ShardingOption], topology: Topology, machine: Machine) -> PlanReport:
    held = [0] * machine.world_size
    busy = [0.0] * machine.world_size
    tables = []
    for option in best:
        times = []
        for shard in option.shards:
            assert shard.rank is not None
            times.append(shard.perf.total if shard.perf is not None else 0.0)
            held[shard.rank] += _bytes(shard.storage)
            busy[shard.rank] += times[-1]
        rows, width = option.tensor.shape
        tables.append(
            TablePlan(
                collection=option.module[0],
                table=option.name,
                rows=rows,
                width=width,
                weight_bytes=option.tensor.numel() * option.tensor.element_size(),
                bytes=_bytes(option.total_storage),
                type=option.sharding_type,
                kernel=option.compute_kernel,
                ranks=tuple(cast(int, shard.rank) for shard in option.shards),
                milliseconds=max(times),
            )
        )
    return PlanReport(
        tables=tuple(sorted(tables, key=lambda table: (-table.bytes, table.table))),
        device=machine.device,
        capacity_bytes=_bytes(topology.devices[0].storage),
        rank_bytes=tuple(held),
        rank_milliseconds=tuple(busy),
    )


def _needs(options: list[ShardingOption], tables: Mapping[str, Table]) -> list[TableNeed]:
    """What each table needs at the least, in the way of cutting it that needs least of a rank."""
    needs = []
    for name, table in tables.items():
        ways = [option for option in options if option.name == name]
        largest = {way: max(_bytes(shard.storage) for shard in way.shards) for way in ways}
        best = min(ways, key=lambda way: largest[way])
        needs.append(
            TableNeed(
                table=name,
                rows=table.rows,
                width=table.width,
                bytes=_bytes(best.total_storage),
                largest_shard=largest[best],
                types=tuple(sorted({way.sharding_type for way in ways})),
            )
        )
    return needs


def _bytes(storage: Storage | None) -> int:
    return 0 if storage is None else storage.hbm + storage.ddr


class _Recorder(Stats):
    """Keeps the planner's choice, which it shows to its statistics only."""

    def __init__(self) -> None:
        self.best: list[ShardingOption] = []

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Take note."""
        self.best = kwargs["best_plan"]
