"""Configuration -> the sharded model with its optimizers, as training and evaluation use it."""

import logging
from dataclasses import dataclass

import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.embeddings.frozen import load_frozen_tables
from torchrec_hilomoe.embeddings.unpooled_as_pooled import look_up_unpooled_as_pooled
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.inputs import schedule_of
from torchrec_hilomoe.training.optimizers.container import OptimizerOptions, OptimizersContainer
from torchrec_hilomoe.training.optimizers.precision import LossScale, use_precision
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
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
        optimizers: Optimizers of that model.
        plan: Report of where its tables are.
    """

    model: DistributedModelParallel
    optimizers: OptimizersContainer
    plan: PlanReport


def assemble(
    config: RunConfig, task: TrainTask, context: DistributedContext, *, decided: bool = True
) -> Assembly:
    """Shard a model and give it its optimizers; a collective call.

    Args:
        config: The run.
        task: Its model, as it is now.
        context: This process among the ranks.
        decided: Whether it is known what routes the model; false leaves it uncompiled.
    """
    train = config.train
    check_capabilities(train, schedule_of(config).stages, context.device.type)
    fuse_table_optimizer(task.model.sparse, train)
    rows = train.batch_size // context.world.size // train.gradient_accumulation_steps
    planned = plan_tables(task, max(1, rows), context.device, config.sharding)
    logger.info("%s", planned.report.text())
    # Tables are drawn on each rank for itself, so ranks must not draw the same numbers.
    torch.manual_seed(config.seed * 100_003 + context.world.rank + 1)
    model = shard(
        task,
        planned.plan,
        context.device,
        sharders=sharders_of(train),
        static_graph=train.gradient_accumulation_steps == 1,
    )
    if task.model.sparse.unpooled is not None:
        assert isinstance(task.model.sparse.unpooled, ShardedEmbeddingCollection)
        look_up_unpooled_as_pooled(task.model.sparse.unpooled)
    if config.data.path is not None:
        load_frozen_tables(task.model.sparse, config.data.path)
    use_precision(task, train.precision, context.device)
    if train.teacher is not None:
        task.teacher_weight = train.teacher_weight
        task.teacher_temperature = train.teacher_temperature
    set_auxiliary_loss_scale(task, 1.0 / train.gradient_accumulation_steps)
    loss_scale = None
    if train.precision == "fp16":
        loss_scale = LossScale(context.device, train.gradient_accumulation_steps)
        loss_scale.attach(task)
    if train.compile and decided:  # hooks that come later are not heard
        task.model.backbone.compile()
    optimizers = OptimizersContainer(model, _optimizer_options(config), loss_scale)
    return Assembly(model=model, optimizers=optimizers, plan=planned.report)


def _optimizer_options(config: RunConfig) -> OptimizerOptions:
    train = config.train
    stages = schedule_of(config).stages
    return OptimizerOptions(
        learning_rate=train.learning_rate,
        table_learning_rate=train.table_learning_rate,
        optimizer=train.optimizer,
        others=[stage.optimizer for stage in stages if stage.optimizer is not None],
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        max_grad_norm=train.max_grad_norm,
    )
