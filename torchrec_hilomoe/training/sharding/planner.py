"""Where tables go: TorchRec's planner, constrained by what a device can do and a user wants.

Every call of TorchRec's planner is in this file and its neighbours.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import (
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    Enumerator,
    HardwareConfig,
    KernelConfig,
    Partitioner,
    PlannerError,
    ShardingOption,
    Stats,
    Storage,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.config.sharding import parse_bytes, ShardingConfig, TableSharding
from torchrec_hilomoe.training.sharding.capabilities import (
    CAPABILITIES,
    check_tables,
    Machine,
    Table,
)
from torchrec_hilomoe.training.sharding.plan_report import PlanReport, TablePlan
from torchrec_hilomoe.training.sharding.shortage import NoPlanError, shortage_of

__all__ = [
    "DeterministicEnumerator",
    "PinnedPartitioner",
    "PlannerResult",
    "make_plan",
    "tables_by_module",
    "topology_of",
]


class DeterministicEnumerator(Enumerator):
    """TorchRec's enumerator, in a fixed order.

    TorchRec's own goes through sets of names, so that among options it holds equally fast the
    choice falls by the process's hash seed: a plan made elsewhere, or anew, would be another one.

    Args:
        found: TorchRec's own.
    """

    def __init__(self, found: EmbeddingEnumerator) -> None:
        self._found = found

    def enumerate(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> list[ShardingOption]:
        """Return the options of each table; tables in the order of the model, options by name."""
        sharding_options = self._found.enumerate(module, sharders)
        tables = {option.fqn: None for option in sharding_options}
        place = {table: index for index, table in enumerate(tables)}
        # The last ones first: simple types have the later names, and of equals the first is taken.
        return sorted(
            sorted(
                sharding_options,
                key=lambda option: (option.sharding_type, option.compute_kernel),
                reverse=True,
            ),
            key=lambda option: place[option.fqn],
        )

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Let TorchRec estimate storage and time."""
        self._found.populate_estimates(sharding_options)


class PinnedPartitioner(Partitioner):
    """TorchRec's greedy partitioner, after the tables whose ranks are given.

    Args:
        pinned: Ranks of a table's shards, in order.
    """

    def __init__(self, pinned: Mapping[str, tuple[int, ...]]) -> None:
        self._pinned = pinned
        self._greedy = GreedyPerfPartitioner()

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology
    ) -> list[ShardingOption]:
        """Place every shard.

        Raises:
            PlannerError: If one does not fit.
        """
        if not self._pinned:
            return self._greedy.partition(proposal, storage_constraint)
        left = copy.deepcopy(storage_constraint)
        for option in proposal:
            for shard, rank in zip(option.shards, self._pinned.get(option.name, ()), strict=False):
                device = left.devices[rank]
                assert shard.storage is not None
                assert shard.perf is not None
                if not shard.storage.fits_in(device.storage):
                    raise PlannerError(f"{option.name} does not fit on rank {rank}")
                shard.rank = rank
                device.storage -= shard.storage
                device.perf += shard.perf
        free = [option for option in proposal if option.name not in self._pinned]
        placed = {option.name: option for option in self._greedy.partition(free, left)}
        return [placed.get(option.name, option) for option in proposal]


GIGABYTE = 2**30
PER_MILLISECOND = 1e-3


def topology_of(machine: Machine, options: ShardingConfig) -> Topology:
    """Describe the machine, less what is reserved; TorchRec reserves of a GPU's memory only."""
    given: dict[str, Any] = {
        name: value * GIGABYTE * PER_MILLISECOND
        for name, value in (
            ("hbm_mem_bw", options.hbm_bandwidth),
            ("ddr_mem_bw", options.ddr_bandwidth),
            ("intra_host_bw", options.intra_host_bandwidth),
            ("inter_host_bw", options.inter_host_bandwidth),
        )
        if value is not None
    }
    left = 1.0 - options.reserve
    hbm = _hbm(options) if machine.device == "cuda" else 0
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=machine.world_size,
            local_world_size=machine.local_world_size,
            hbm_cap_bytes=int(hbm * left),
            ddr_cap_bytes=int(_ddr(options, machine) * left),
        ),
        hardware_config=HardwareConfig(**given),
        kernel_config=KernelConfig(
            compute_device=machine.device, use_hardware_based_bandwidth=bool(given)
        ),
    )


def _hbm(options: ShardingConfig) -> int:
    if options.hbm is not None:
        return parse_bytes(options.hbm, "sharding.hbm")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _ddr(options: ShardingConfig, machine: Machine) -> int:
    if options.ddr is not None:
        return parse_bytes(options.ddr, "sharding.ddr")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // machine.local_world_size


# A table is only worth splitting by columns if each half still fills a few cache lines.
NARROWEST_SPLIT = 64

USUAL = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE)

# Shards that the search through all plans may place: it takes time with their number, and TorchRec
# limits only that of plans.
SEARCHED = 200_000
MOST_PLANS = 10_000  # TorchRec's own limit


@dataclass(frozen=True, kw_only=True)
class PlannerResult:
    """A plan, with all that TorchRec knows of it.

    Attributes:
        plan: Sharding plan of every collection.
        report: Report of the plan, for people.
        best_plan: Sharding option of each table, with TorchRec's estimates for each shard.
        topology: Machine as TorchRec was told of it, less what is reserved.
        constraints: Constraints of each table.
    """

    plan: ShardingPlan
    report: PlanReport
    best_plan: list[ShardingOption]
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
            for it in self.best_plan
        }
        enumerator = EmbeddingEnumerator(self.topology, batch_size=batch_size, constraints=only)
        sharding_options = {
            option.name: option for option in enumerator.enumerate(module, get_default_sharders())
        }
        return [sharding_options[it.name] for it in self.best_plan]


def make_plan(
    module: nn.Module,
    machine: Machine,
    options: ShardingConfig,
    *,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
) -> PlannerResult:
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
    enumerator = DeterministicEnumerator(
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
        partitioner=PinnedPartitioner(pinned),
        stats=recorder,
    )
    sharders = get_default_sharders()
    try:
        plan = planner.plan(module, sharders)
    except PlannerError as error:
        shortage = shortage_of(enumerator.enumerate(module, sharders), topology)
        raise NoPlanError(shortage, options) from error
    planned = {table for tables in tables_by_module(plan).values() for table in tables}
    missing = sorted(set(tables) ^ planned)
    if missing:
        raise ValueError(
            f"sharding: tables {', '.join(missing)} are in the model or in the plan, not in both, "
            "so that they would not be sharded. Does TorchRec shard the module that they are in?"
        )
    return PlannerResult(
        plan=plan,
        report=_report(recorder.best, topology, machine),
        best_plan=recorder.best,
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
    # A rank that is alone shares no table: cut by rows, ids would be sorted into one bucket.
    usual = USUAL if machine.world_size > 1 else (ShardingType.TABLE_WISE,)
    types = [kind for kind in possible if kind in usual]
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


def _bytes(storage: Storage | None) -> int:
    return 0 if storage is None else storage.hbm + storage.ddr


class _Recorder(Stats):
    """Keeps the planner's choice, which it shows to its statistics only."""

    def __init__(self) -> None:
        self.best: list[ShardingOption] = []

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Take note."""
        self.best = kwargs["best_plan"]
