"""Configuration -> the sharded model with its optimizers, as training and evaluation use it."""

import logging
from dataclasses import dataclass

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import Job
from torchrec_hilomoe.training.optimizers import Learners
from torchrec_hilomoe.training.sharding import (
    describe_plan,
    fuse_table_optimizer,
    plan_tables,
    shard,
)

__all__ = ["Assembly", "assemble"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model ready to run on all ranks.

    Attributes:
        model: Tables sharded, the rest replicated.
        learners: Its optimizers.
    """

    model: DistributedModelParallel
    learners: Learners


def assemble(config: RunConfig, task: TrainTask, job: Job) -> Assembly:
    """Shard a model and give it its optimizers; a collective call."""
    train = config.train
    fuse_table_optimizer(
        task.model.sparse, train.table_optimizer, train.table_learning_rate, job.device
    )
    plan = plan_tables(task, train.batch_size // job.world.size, job.device)
    for line in describe_plan(plan):
        logger.info("table %s", line)
    # Tables are drawn on each rank for itself, so ranks must not draw the same numbers.
    torch.manual_seed(config.seed * 100_003 + job.world.rank + 1)
    model = shard(task, plan, job.device)
    return Assembly(
        model=model,
        learners=Learners(model, train.learning_rate, train.table_learning_rate),
    )
