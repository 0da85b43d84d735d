"""Configuration -> the sharded model with its optimizers, as training and evaluation use it."""

import logging
from dataclasses import dataclass

import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.embeddings.bags_of_one import look_up_bags_of_one
from torchrec_hilomoe.embeddings.frozen import load_frozen_tables
from torchrec_hilomoe.hilomoe.sites import set_auxiliary_loss_scale
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import Job
from torchrec_hilomoe.training.inputs import schedule_of
from torchrec_hilomoe.training.optimizers.learners import LearnerOptions, Learners
from torchrec_hilomoe.training.optimizers.precision import LossScale, use_precision
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.sharding.report import PlanReport
from torchrec_hilomoe.training.sharding.shard import (
    fuse_table_optimizer,
    plan_tables,
    shard,
    sharders_of,
)

__all__ = ["Assembly", "assemble"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model ready to run on all ranks.

    Attributes:
        model: Tables sharded, the rest replicated.
        learners: Its optimizers.
        plan: Where its tables are.
    """

    model: DistributedModelParallel
    learners: Learners
    plan: PlanReport


def assemble(config: RunConfig, task: TrainTask, job: Job) -> Assembly:
    """Shard a model and give it its optimizers; a collective call."""
    train = config.train
    check_capabilities(train, schedule_of(config).stages, job.device.type)
    fuse_table_optimizer(task.model.sparse, train)
    rows = train.batch_size // job.world.size // train.accumulate
    planned = plan_tables(task, max(1, rows), job.device, config.sharding)
    logger.info("%s", planned.report.text())
    # Tables are drawn on each rank for itself, so ranks must not draw the same numbers.
    torch.manual_seed(config.seed * 100_003 + job.world.rank + 1)
    model = shard(task, planned.plan, job.device, sharders=sharders_of(train))
    assert isinstance(task.model.sparse.unpooled, ShardedEmbeddingCollection)
    look_up_bags_of_one(task.model.sparse.unpooled)
    if config.data.path is not None:
        load_frozen_tables(task.model.sparse, config.data.path)
    use_precision(task, train.precision, job.device)
    set_auxiliary_loss_scale(task, 1.0 / train.accumulate)
    loss_scale = None
    if train.precision == "fp16":
        loss_scale = LossScale(job.device, train.accumulate)
        loss_scale.attach(task)
    if train.compile:
        task.model.backbone.compile()
    learners = Learners(model, _learner_options(config), loss_scale)
    return Assembly(model=model, learners=learners, plan=planned.report)


def _learner_options(config: RunConfig) -> LearnerOptions:
    train = config.train
    stages = schedule_of(config).stages
    return LearnerOptions(
        learning_rate=train.learning_rate,
        table_learning_rate=train.table_learning_rate,
        optimizer=train.optimizer,
        others=[stage.optimizer for stage in stages if stage.optimizer is not None],
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        clip_norm=train.clip_norm,
    )
