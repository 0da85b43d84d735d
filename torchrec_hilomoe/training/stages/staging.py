"""A stage, applied to a model: which parts compute and which may change.

A parameter that is frozen when data parallelism wraps the model and unfrozen later would train
without all-reduce. So a boundary first sets ``requires_grad`` and then wraps the model anew.
"""

from collections.abc import Iterable

from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.hilomoe.inject import expert_parameters, sites_of
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training.sharding.shard import shard
from torchrec_hilomoe.training.stages import Stage

__all__ = [
    "activate_layers",
    "check_stages",
    "enter_stage",
    "set_training_mode",
    "share_statistics",
]


def check_stages(task: TrainTask, stages: Iterable[Stage], *, later: int = 0) -> None:
    """Refuse, before the first step, stages that the model cannot follow.

    Args:
        task: The model.
        stages: The stages.
        later: Layers of the experts that a plain model may get later.

    Raises:
        ValueError: If a stage names more layers than a site has, or trains experts alone and
            there are none.
    """
    layers = {name: site.config.num_layers for name, site in sites_of(task).items()}
    if not layers and later:
        layers = {"(yet to come)": later}
    for stage in stages:
        if not layers and not (stage.train_backbone or stage.train_tables):
            raise ValueError(
                f"Stage {stage.name!r} trains experts alone, but the model has none. "
                "Set model.hilomoe or drop the stage."
            )
        named = {
            "active_layers": stage.active_layers or 0,
            "learning_layers": max(stage.learning_layers or (0,)),
        }
        for name, most in layers.items():
            for option, layer in named.items():
                if layer > most:
                    raise ValueError(
                        f"Stage {stage.name!r}: {option} names layer {layer}, but site {name!r} "
                        f"has {most}. Lower it or raise model.hilomoe.num_layers."
                    )


def enter_stage(
    model: DistributedModelParallel, stage: Stage, *, static_graph: bool = True
) -> DistributedModelParallel:
    """Prepare the model for a stage and wrap it anew.

    Args:
        model: The sharded model, detached from any pipeline.
        stage: What follows.
        static_graph: As in :func:`torchrec_hilomoe.training.sharding.shard`.

    Returns:
        The same tables and parameters under a new wrapper.
    """
    task = model.module
    assert isinstance(task, TrainTask)
    share_statistics(task)
    activate_layers(task, stage)
    task.model.sparse.frozen = not stage.train_tables
    tables = set(task.model.sparse.tables)
    experts = set(expert_parameters(task).values())
    for parameter in task.parameters():
        if parameter in experts:
            parameter.requires_grad_(stage.experts_learn)
        elif parameter not in tables:
            parameter.requires_grad_(stage.train_backbone)
    set_training_mode(task, stage)
    return shard(task, model.plan, model.device, static_graph=static_graph)


def activate_layers(model: nn.Module, stage: Stage) -> None:
    """Let each site compute the expert layers of a stage."""
    for site in sites_of(model).values():
        layers = stage.active_layers
        site.active_layers = site.config.num_layers if layers is None else layers


def share_statistics(task: nn.Module) -> None:
    """Give every rank the first one's running statistics; a collective call.

    Each rank gathers them over its own rows. The first rank's stay as they are, so a run does not
    depend on when, and how often, they are shared.
    """
    for module in task.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def set_training_mode(model: nn.Module, stage: Stage) -> None:
    """Switch to training, but keep the running statistics of a frozen backbone as they are.

    Args:
        model: With its wrappers, if it has any: TorchRec's pipeline asks the outermost whether to
            train.
        stage: What trains.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(stage.train_backbone)
