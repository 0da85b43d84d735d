"""A stage, applied to a model: which parts compute and which may change.

A parameter that is frozen when data parallelism wraps the model and unfrozen later would train
without all-reduce. So a boundary first sets ``requires_grad`` and then wraps the model anew.
"""

from collections.abc import Collection, Iterable
from typing import cast, TypeVar

from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchrec.distributed.types import ShardedModule

from torchrec_hilomoe.embeddings.freezing import freeze_lookups, lookups_of, table_parameters
from torchrec_hilomoe.hilomoe.inject import expert_parameters, sites_of
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.wrapping import (
    process_group_of,
    unwrapped,
    Wrap,
    wrapped_like,
)

__all__ = [
    "activate_layers",
    "check_stages",
    "enter_stage",
    "set_training_mode",
    "share_statistics",
]

Model = TypeVar("Model", bound=nn.Module)


def check_stages(model: nn.Module, stages: Iterable[Stage], *, later: int = 0) -> None:
    """Refuse, before the first step, stages that the model cannot follow.

    Args:
        model: The model, not its wrapper.
        stages: The stages.
        later: Layers of the experts that a plain model may get later.

    Raises:
        ValueError: If a stage names more layers than a site has, or trains experts alone and
            there are none.
    """
    layers = {name: site.config.num_layers for name, site in sites_of(model).items()}
    if not layers and later:
        layers = {"(yet to come)": later}
    for stage in stages:
        if not layers and not (stage.train_backbone or stage.train_tables):
            raise ValueError(
                f"Stage {stage.name!r} trains experts alone, but the model has none. "
                "Inject them (model.hilomoe of a configuration) or drop the stage."
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
                        f"has {most}. Lower it or raise num_layers (model.hilomoe.num_layers)."
                    )


def enter_stage(
    model: Model, stage: Stage, *, fixed: Collection[nn.Parameter] = (), wrap: Wrap | None = None
) -> Model:
    """Prepare the model for a stage and wrap it anew; a collective call.

    Args:
        model: Detached from any pipeline; in its wrapper, if it has one.
        stage: What follows.
        fixed: Parameters that learn in no stage.
        wrap: What wraps the model, in place of a wrapper like the one that it is in.

    Returns:
        The same tables and parameters under a new wrapper.
    """
    module = unwrapped(model)
    share_statistics(module, process_group_of(model))
    activate_layers(module, stage)
    freeze_lookups(module, not stage.train_tables)
    # What of sharded tables learns was decided when they were sharded.
    sharded = {
        table
        for lookup in lookups_of(module).values()
        if isinstance(lookup, ShardedModule)
        for table in lookup.parameters()
    }
    tables, experts = table_parameters(module), set(expert_parameters(module).values())
    fixed = set(fixed)
    for parameter in module.parameters():
        if parameter in experts:
            learns = stage.experts_learn
        else:
            learns = stage.train_tables if parameter in tables else stage.train_backbone
        # FSDP, too, has decided it: there a frozen parameter gets gradients, which are dropped.
        if parameter not in sharded and not isinstance(parameter, DTensor):
            parameter.requires_grad_(learns and parameter not in fixed)
    wrapped = wrapped_like(model, wrap)
    set_training_mode(wrapped, stage)
    return cast(Model, wrapped)


def activate_layers(model: nn.Module, stage: Stage) -> None:
    """Let each site compute the expert layers of a stage."""
    for site in sites_of(model).values():
        layers = stage.active_layers
        site.active_layers = site.config.num_layers if layers is None else layers


def share_statistics(task: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the first one's running statistics; a collective call, if there are ranks.

    Each rank gathers them over its own rows. The first rank's stay as they are, so a run does not
    depend on when, and how often, they are shared.

    Args:
        task: What has them.
        group: Ranks that train it; None are all.
    """
    if not dist.is_initialized():
        return
    for module in task.modules():
        if isinstance(module, _BatchNorm):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, group=group, group_src=0)


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
