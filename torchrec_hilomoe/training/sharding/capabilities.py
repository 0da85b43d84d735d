"""What TorchRec can do on a kind of device, and what a configuration is told that asks for more.

Measured with torch 2.13, torchrec 1.8 and fbgemm-gpu 1.8. The planner is constrained by it, so
that a run fails when it is configured and not in its first step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from torchrec.distributed.types import ShardingType

from torchrec_hilomoe.config.sharding import ShardingConfig, TableSharding
from torchrec_hilomoe.config.train import TrainConfig
from torchrec_hilomoe.training.stages import Stage

__all__ = ["CAPABILITIES", "Capability", "Machine", "Table", "check_capabilities", "check_tables"]


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What TorchRec can do on a kind of device.

    Attributes:
        pooled: Sharding types that train an ``EmbeddingBagCollection``.
        unpooled: Sharding types that train an ``EmbeddingCollection``.
        kernels: Compute kernels of a table, which say where its rows are.
        table_optimizers: Optimizers that can be fused into a table's backward pass.
        decaying: Table optimizers whose weight decay has an effect.
        pipelines: Ways in which steps can overlap.
    """

    pooled: tuple[ShardingType, ...]
    unpooled: tuple[ShardingType, ...]
    kernels: tuple[str, ...]
    table_optimizers: tuple[str, ...]
    decaying: tuple[str, ...]
    pipelines: tuple[str, ...]


# Data-parallel tables are left out everywhere: they would need a dense optimizer of their own,
# and they cannot be frozen by detaching the lookups. On CPU, row-wise pooled tables are refused
# by TorchRec and data-parallel sequence tables crash.
CAPABILITIES: Mapping[str, Capability] = MappingProxyType(
    {
        "cpu": Capability(
            pooled=(ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE),
            unpooled=(ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE),
            kernels=("fused",),
            table_optimizers=("rowwise_adagrad", "adagrad", "sgd"),
            decaying=(),
            pipelines=("auto", "base", "sparse_dist"),
        ),
        "cuda": Capability(
            pooled=(
                ShardingType.TABLE_WISE,
                ShardingType.ROW_WISE,
                ShardingType.COLUMN_WISE,
                ShardingType.TABLE_ROW_WISE,
                ShardingType.TABLE_COLUMN_WISE,
                ShardingType.GRID_SHARD,
            ),
            unpooled=(ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE),
            kernels=("fused", "fused_uvm", "fused_uvm_caching"),
            table_optimizers=("rowwise_adagrad", "adagrad", "sgd", "adam"),
            decaying=("rowwise_adagrad", "adam"),
            pipelines=("auto", "base", "sparse_dist", "prefetch", "semi_sync"),
        ),
    }
)

# Both need streams, on which to look up, or to fill a cache, while the step before computes.
GPU_ONLY = "looks tables up on a stream of its own, which a CPU does not have"


def check_capabilities(train: TrainConfig, stages: Sequence[Stage], device: str) -> None:
    """Refuse what cannot be done, all reasons at once.

    Args:
        train: What is asked for.
        stages: Of the run.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: Naming each option, the reason and the remedy.
    """
    capability = CAPABILITIES[device]
    problems = []
    if train.table_optimizer not in capability.table_optimizers:
        problems.append(
            f"train.table_optimizer is {train.table_optimizer!r}, which cannot be fused on "
            f"{device}; there use one of {', '.join(capability.table_optimizers)}"
        )
    if train.table_weight_decay and train.table_optimizer not in capability.decaying:
        which = " or ".join(capability.decaying)
        remedy = f"use {which}" if which else "FBGEMM ignores it on every one: set it to 0"
        problems.append(
            f"train.table_weight_decay is {train.table_weight_decay}, which has no effect with "
            f"{train.table_optimizer!r} on {device}; {remedy}"
        )
    pipelined = not train.debug
    if pipelined and train.pipeline not in capability.pipelines:
        problems.append(
            f"train.pipeline is {train.pipeline!r}, which {GPU_ONLY}; on {device} use one of "
            f"{', '.join(capability.pipelines)}"
        )
    if (
        pipelined
        and train.pipeline in ("prefetch", "semi_sync")
        and train.gradient_accumulation_steps > 1
    ):
        problems.append(
            f"train.gradient_accumulation_steps is {train.gradient_accumulation_steps} with "
            f"train.pipeline {train.pipeline!r}, whose steps overlap beyond a micro-batch; use "
            "sparse_dist"
        )
    if pipelined and train.pipeline == "semi_sync":
        frozen = [stage.name for stage in stages if not stage.train_tables]
        if frozen:
            problems.append(
                f"train.pipeline is 'semi_sync', but stages {', '.join(frozen)} freeze the tables, "
                "whose backward pass it always runs; use sparse_dist, or set train.frozen_share 0"
            )
    if problems:
        raise ValueError("; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a job runs on.

    Attributes:
        world_size: Ranks.
        local_world_size: Ranks of a host.
        device: ``cpu`` or ``cuda``.
    """

    world_size: int
    local_world_size: int
    device: str


@dataclass(frozen=True)
class Table:
    """A table's kind and size."""

    pooled: bool
    rows: int
    width: int
    features: tuple[str, ...]


def check_tables(tables: Mapping[str, Table], machine: Machine, options: ShardingConfig) -> None:
    """Refuse options that a table or the machine does not support.

    Raises:
        ValueError: Naming the table, the option and what would do.
    """
    capability = CAPABILITIES[machine.device]
    for name, wanted in options.tables.items():
        where = f"sharding.tables.{name}"
        if name not in tables:
            near = get_close_matches(name, tables, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(tables)}."
            raise ValueError(f"{where}: the model has no table {name!r}. {hint}")
        types = capability.pooled if tables[name].pooled else capability.unpooled
        names = [kind.value for kind in types]
        kind = "pooled" if tables[name].pooled else "sequence"
        if wanted.type is not None and wanted.type not in names:
            raise ValueError(
                f"{where}: type {wanted.type!r} does not train a {kind} table on {machine.device}; "
                f"use one of {', '.join(names)}, or null."
            )
        if wanted.kernel is not None and wanted.kernel not in capability.kernels:
            raise ValueError(
                f"{where}: kernel {wanted.kernel!r} does not exist on {machine.device}; use "
                f"{' or '.join(capability.kernels)}, or null."
            )
        _check_ranks(where, wanted, tables[name], machine)


def _check_ranks(where: str, wanted: TableSharding, table: Table, machine: Machine) -> None:
    ranks = wanted.ranks or ()
    if ranks and max(ranks) >= machine.world_size:
        raise ValueError(
            f"{where}: ranks = {ranks} names rank {max(ranks)}, but the job has ranks 0 to "
            f"{machine.world_size - 1}."
        )
    if wanted.type == "column_wise" and len(ranks) > 1 and table.width % (4 * len(ranks)):
        raise ValueError(
            f"{where}: width {table.width} cannot be cut into {len(ranks)} columns that are "
            "multiples of 4, which FBGEMM's kernels want; name another number of ranks."
        )
