"""Small models of the toy data, with tables in memory where the package leaves them on ``meta``."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.helpers.datasets import SCHEMA, toy_source
from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm
from torchrec_hilomoe.config import BSTConfig, InjectionConfig, ModelConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.world import World

__all__ = ["MODEL", "batches", "cancelled", "dense_parameters", "in_memory", "task_of"]

MODEL = ModelConfig(
    embedding_dim=4,
    head=(8, 6),
    bst=BSTConfig(num_heads=2),
    hilomoe=InjectionConfig(num_layers=2, num_experts=4, rank=2, query_dim=3),
)


def in_memory(config: ModelConfig = MODEL, schema: Schema = SCHEMA) -> TrainTask:
    """The task that is trained, whole in one process and without TorchRec's sharding."""
    task = build_task(config, schema)
    task.model.sparse = SparseArch(schema, config.embedding_dim, torch.device("cpu"))
    return task


def task_of(model: DistributedModelParallel) -> TrainTask:
    """The task inside TorchRec's wrappers."""
    task = model.module
    assert isinstance(task, TrainTask)
    return task


def dense_parameters(task: TrainTask) -> dict[str, torch.nn.Parameter]:
    """Everything that is no table, by name."""
    tables = set(task.model.sparse.parameters())
    return {name: p for name, p in task.named_parameters() if p not in tables}


def cancelled(task: TrainTask) -> set[str]:
    """Biases that the batch norm behind them takes away again: their gradient is all rounding."""
    return {
        f"{name}.{index}.bias"
        for name, layers in task.named_modules()
        if isinstance(layers, nn.Sequential)
        for index, (_, after) in enumerate(pairwise(layers))
        if isinstance(after, GlobalBatchNorm)
    }


def batches(
    rows: int, batch_size: int, *, world: World | None = None, epochs: int | None = 1
) -> Iterator[CTRBatch]:
    """This rank's share of the toy data's batches, in order."""
    return iter(
        Loader(
            toy_source(rows),
            batch_size=batch_size,
            world=world,
            shuffle=False,
            epochs=epochs,
            prefetch=0,
        )
    )
