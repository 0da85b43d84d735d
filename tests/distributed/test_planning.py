"""What is planned without ranks is what ranks shard and allocate: the same plan, the same bytes."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import distributed as dist
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, MODEL, task_of
from tests.helpers.processes import run_ranks
from tests.helpers.sharded import assembled
from torchrec_hilomoe.config import (
    InjectionConfig,
    RunConfig,
    ShardingConfig,
    TableSharding,
    TrainConfig,
)
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run
from torchrec_hilomoe.planning.memory import DenseMemory
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import enter_stage

ALL = Stage(name="all")
FREE = RunConfig(model=replace(MODEL, embedding_dim=8))
CUT = replace(
    FREE,
    sharding=ShardingConfig(
        tables={
            "user": TableSharding(type="table_wise", ranks=(1,)),
            "tag": TableSharding(type="column_wise", ranks=(1, 0)),
            "item": TableSharding(type="row_wise"),
        }
    ),
)
WIDE = replace(
    FREE,
    model=replace(MODEL, embedding_dim=64, backbone="din", hilomoe=InjectionConfig(enabled=False)),
)
CONFIGS = {
    "free": FREE,
    "cut": CUT,
    "cut, adagrad": replace(
        CUT, train=TrainConfig(table_optimizer="adagrad", optimizer="sgd", momentum=0.9)
    ),
    "wide, sgd": replace(WIDE, train=TrainConfig(table_optimizer="sgd", optimizer="adagrad")),
}


@dataclass(frozen=True)
class Held:
    """What one rank planned and holds."""

    report: PlanReport
    tables: int
    state: int
    dense: DenseMemory


def allocated(config: RunConfig) -> Held:
    """Shard, make a step, and count the bytes of what there is."""
    assembly = assembled(config)
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    task = task_of(model)
    sharded = set(task.model.sparse.tables)
    dense = [p for p in task.parameters() if p not in sharded]
    gradients: dict[int, int] = {}
    for place, parameter in enumerate(dense):
        parameter.register_post_accumulate_grad_hook(partial(note_gradient, gradients, place))
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    pipeline.step(batches(16, 16, world=World(rank=dist.get_rank(), size=dist.get_world_size())))
    pipeline.detach()
    kernels = kernels_of(task.model.sparse)
    return Held(
        report=assembly.plan,
        tables=sum(nbytes(kernel.weights_host) for kernel in kernels),
        state=sum(nbytes(state) for kernel in kernels for state in table_states(kernel)),
        dense=DenseMemory(
            parameters=sum(tensor.nbytes for tensor in [*dense, *task.model.backbone.buffers()]),
            gradients=sum(gradients.values()),
            state=sum(state.nbytes for state in dense_states(assembly.optimizers.combined)),
        ),
    )


def kernels_of(sparse: SparseArch) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's, which hold the rows; a sharded collection hides its lookups in a list."""
    sharded = (ShardedEmbeddingCollection, ShardedEmbeddingBagCollection)
    collections = [module for module in sparse.modules() if isinstance(module, sharded)]
    lookups = [lookup for collection in collections for lookup in collection._lookups]
    inside = [module for lookup in lookups for module in lookup.modules()]
    return [m for m in inside if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]


def note_gradient(seen: dict[int, int], place: int, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    seen[place] = parameter.grad.nbytes


def nbytes(buffer: object) -> int:
    assert isinstance(buffer, torch.Tensor)
    return buffer.untyped_storage().nbytes()


def table_states(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> list[object]:
    """Numbers that FBGEMM keeps for a table's rows; it has none for SGD."""
    if "sgd" in str(kernel.optimizer).lower():
        return []
    return [kernel.momentum1_host]


def dense_states(combined) -> list[torch.Tensor]:
    return [
        value
        for name, optimizer in combined.optimizers
        if name != "tables"
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def all_allocated() -> dict[str, Held]:
    return {name: allocated(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_planned_as_ranks_shard_and_allocate(ranks):
    found = run_ranks(all_allocated, ranks)
    for name, config in CONFIGS.items():
        plan = plan_run(config, SCHEMA, Cluster(world_size=ranks, device="cpu"))
        for rank, held in enumerate(each[name] for each in found):
            assert held.report == plan.report, name
            memory = plan.ranks[rank].memory
            assert (held.tables, held.state) == (memory.tables, memory.state), (name, rank)
            assert held.dense == plan.dense, (name, rank)
        whole = sum(table.weight_bytes for table in plan.report.tables)
        assert sum(each[name].tables for each in found) == whole
