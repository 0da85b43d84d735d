"""A planned model, sharded: tables where the plan says, the rest replicated."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import distributed as dist
from torch import nn

# TorchRec's own name for it is deprecated in favour of this one.
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_hilomoe.config import ShardingConfig, TrainConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.sharding.capabilities import Machine
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
from torchrec_hilomoe.training.sharding.planner import make_plan
from torchrec_hilomoe.training.stages.wrapping import dense_learns

__all__ = [
    "PlannedTables",
    "fuse_table_optimizer",
    "ids_of_a_row",
    "plan_tables",
    "shard",
    "sharders_of",
]

TABLE_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = MappingProxyType(
    {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
    }
)


def fuse_table_optimizer(sparse: SparseArch, train: TrainConfig) -> None:
    """Fuse an optimizer into the backward pass of the tables that learn; before they are sharded.

    What a device cannot fuse is refused by
    :func:`torchrec_hilomoe.training.sharding.capabilities.check_capabilities`.
    """
    options = {"lr": train.table_learning_rate}
    if train.table_weight_decay:
        options["weight_decay"] = train.table_weight_decay
    apply_optimizer_in_backward(
        TABLE_OPTIMIZERS[train.table_optimizer], sparse.trained_tables, options
    )


def sharders_of(train: TrainConfig) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's sharders, told what the tables' kernels must be able to do."""
    fused: dict[str, object] = {}
    if train.pipeline == "prefetch" and not train.debug:
        fused["prefetch_pipeline"] = True
    if train.table_weight_decay and train.table_optimizer == "rowwise_adagrad":
        fused["weight_decay_mode"] = WeightDecayMode.L2  # it decays nothing unless it is told how
    sharders = (
        EmbeddingBagCollectionSharder(fused_params=dict(fused)),
        EmbeddingCollectionSharder(fused_params=dict(fused)),
    )
    # Each is typed by the one module that it shards.
    return [cast(ModuleSharder[nn.Module], sharder) for sharder in sharders]


def ids_of_a_row(schema: Schema) -> dict[str, float]:
    """The most ids of a row by feature, where there may be more than one: what must fit."""
    lengths = {field.name: group.max_length for group in schema.sequences for field in group.fields}
    pooled = {feature.name: feature.max_length for feature in schema.pooled}
    return {name: float(length) for name, length in (lengths | pooled).items() if length > 1}


@dataclass(frozen=True, kw_only=True)
class PlannedTables:
    """Where every table goes.

    Attributes:
        plan: Sharding plan of every collection.
        report: Report of the plan, for people.
    """

    plan: ShardingPlan
    report: PlanReport


def plan_tables(
    task: TrainTask, batch_size: int, device: torch.device, options: ShardingConfig
) -> PlannedTables:
    """Plan every collection; a collective call that gives every rank the first one's plan.

    TorchRec's ``collective_plan`` broadcasts only what succeeds: when the first rank finds no plan
    the others wait for ever. It also broadcasts the plan alone, without the estimates that the
    report is made of. So its broadcast is used, of the plan with its report or of the error.

    Args:
        task: The model, its tables on the ``meta`` device.
        batch_size: Rows of one rank in a batch, for the planner's estimates.
        device: What the ranks compute on.
        options: What the user wants.

    Raises:
        ValueError: The same on every rank, if there is no plan; see
            :func:`torchrec_hilomoe.training.sharding.planner.make_plan`.
    """
    machine = Machine(
        world_size=dist.get_world_size(), local_world_size=get_local_size(), device=device.type
    )
    lengths = ids_of_a_row(task.model.sparse.schema)

    def planned_or_error() -> PlannedTables | str:
        try:
            made = make_plan(task, machine, options, batch_size=batch_size, lengths=lengths)
        except ValueError as error:
            return str(error)
        return PlannedTables(plan=made.plan, report=made.report)

    group = dist.group.WORLD
    assert group is not None
    planned = invoke_on_rank_and_broadcast_result(group, 0, planned_or_error)
    if isinstance(planned, str):
        raise ValueError(planned)
    return planned


def shard(
    task: TrainTask,
    plan: ShardingPlan,
    device: torch.device,
    *,
    sharders: list[ModuleSharder[nn.Module]] | None = None,
    static_graph: bool = True,
) -> DistributedModelParallel:
    """Shard the tables by ``plan`` and replicate the rest with gradients averaged over ranks.

    Which parameters are averaged is decided here, by ``requires_grad``, once; a stage wraps anew
    what is inside. With none, nothing is averaged.

    Args:
        task: The model.
        plan: Where its tables go.
        device: What this rank computes on.
        sharders: As :func:`sharders_of` gives them; None takes TorchRec's own.
        static_graph: Whether every backward averages; false lets some only add up.
    """
    return DistributedModelParallel(
        task,
        device=device,
        plan=plan,
        sharders=sharders,
        init_data_parallel=dense_learns(task),
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=static_graph),
    )
