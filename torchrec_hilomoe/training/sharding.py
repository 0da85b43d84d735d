"""Where tables live: what a device can do, the plan, and the sharded model.

Every call of TorchRec's planner is in this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import distributed as dist

# TorchRec's own name for it is deprecated in favour of this one.
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    get_default_sharders,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan, ShardingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["CAPABILITIES", "Capability", "describe_plan", "plan_tables", "shard"]


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What TorchRec can do on a kind of device, as measured with torchrec 1.8.

    Attributes:
        pooled: Sharding types that train an ``EmbeddingBagCollection``.
        unpooled: Sharding types that train an ``EmbeddingCollection``.
        table_optimizers: Optimizers that can be fused into a table's backward pass.
    """

    pooled: tuple[ShardingType, ...]
    unpooled: tuple[ShardingType, ...]
    table_optimizers: tuple[str, ...]


# Data-parallel tables are left out everywhere: they would need a dense optimizer of their own,
# and they cannot be frozen by detaching the lookups. On CPU, row-wise pooled tables are refused
# by TorchRec and data-parallel sequence tables crash.
CAPABILITIES: Mapping[str, Capability] = MappingProxyType(
    {
        "cpu": Capability(
            pooled=(ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE),
            unpooled=(ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE),
            table_optimizers=("rowwise_adagrad", "adagrad", "sgd"),
        ),
        "cuda": Capability(
            pooled=(ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE),
            unpooled=(ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE),
            table_optimizers=("rowwise_adagrad", "adagrad", "sgd", "adam"),
        ),
    }
)

# A table is only worth splitting by columns if each half still fills a few cache lines.
NARROWEST_SPLIT = 64

# Share of a device's memory that is not for tables: the dense part, activations, batches.
RESERVED_SHARE = 0.4

TABLE_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = MappingProxyType(
    {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
    }
)


def fuse_table_optimizer(
    sparse: SparseArch, name: str, learning_rate: float, device: torch.device
) -> None:
    """Fuse an optimizer into the tables' backward pass; before they are sharded.

    Raises:
        ValueError: If the device cannot run that optimizer fused.
    """
    possible = CAPABILITIES[device.type].table_optimizers
    if name not in possible:
        raise ValueError(
            f"train.table_optimizer is {name!r}, which cannot be fused on {device.type}; "
            f"there use one of {', '.join(possible)}."
        )
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[name], sparse.parameters(), {"lr": learning_rate})


def plan_tables(task: TrainTask, batch_size: int, device: torch.device) -> ShardingPlan:
    """Plan both collections together; every rank gets the same plan.

    Args:
        task: The model, its tables on the ``meta`` device.
        batch_size: Rows of one rank in a batch, for the planner's estimates.
        device: What the ranks compute on.

    Raises:
        AssertionError: If a table of the schema is missing from the plan.
    """
    capability = CAPABILITIES[device.type]
    sparse = task.model.sparse
    constraints = {
        table.name: _constrain(capability.unpooled, table.embedding_dim)
        for table in sparse.unpooled.embedding_configs()
    }
    if sparse.pooled is not None:
        for table in sparse.pooled.embedding_bag_configs():
            constraints[table.name] = _constrain(capability.pooled, table.embedding_dim)
    planner = EmbeddingShardingPlanner(
        topology=_topology(device),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED_SHARE),
        stats=[],  # our own report is one line a table
    )
    group = dist.GroupMember.WORLD
    assert group is not None
    plan = planner.collective_plan(task, get_default_sharders(), group)
    planned = {table for tables in _by_module(plan).values() for table in tables}
    assert planned == set(constraints), f"tables {set(constraints) ^ planned} are not planned"
    return plan


def shard(
    task: TrainTask, plan: ShardingPlan, device: torch.device, *, static_graph: bool = True
) -> DistributedModelParallel:
    """Shard the tables by ``plan`` and replicate the rest with gradients averaged over ranks.

    A task whose tables are already sharded is only wrapped anew: which parameters are
    averaged is decided here, by ``requires_grad``, once. With none, nothing is averaged.

    Args:
        task: The model.
        plan: Where its tables go.
        device: What this rank computes on.
        static_graph: Whether every backward averages; false lets some only add up.
    """
    tables = set(task.model.sparse.parameters())
    dense_learns = any(p.requires_grad for p in task.parameters() if p not in tables)
    return DistributedModelParallel(
        task,
        device=device,
        plan=plan,
        init_data_parallel=dense_learns,
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=static_graph),
    )


def describe_plan(plan: ShardingPlan) -> tuple[str, ...]:
    """Return one line a table: name, sharding type, kernel, ranks."""
    return tuple(
        f"{module}.{table}: {parameter.sharding_type}, {parameter.compute_kernel}, "
        f"ranks {parameter.ranks}"
        for module, tables in _by_module(plan).items()
        for table, parameter in tables.items()
    )


def _constrain(types: tuple[ShardingType, ...], embedding_dim: int) -> ParameterConstraints:
    wide = embedding_dim >= NARROWEST_SPLIT
    return ParameterConstraints(
        sharding_types=[
            kind.value for kind in types if wide or kind is not ShardingType.COLUMN_WISE
        ],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
    )


def _by_module(plan: ShardingPlan) -> dict[str, EmbeddingModuleShardingPlan]:
    return cast(dict[str, EmbeddingModuleShardingPlan], plan.plan)


def _topology(device: torch.device) -> Topology:
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=dist.get_world_size()),
        kernel_config=KernelConfig(compute_device=device.type),
    )
