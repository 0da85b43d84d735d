"""Out of a data-parallel wrapper, and into a new one of the same kind.

Which gradients are averaged over ranks is decided when a model is wrapped, by ``requires_grad``,
once. A parameter that is unfrozen later trains without the other ranks, without a word.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.embeddings.freezing import table_parameters
from torchrec_hilomoe.hilomoe.inject import group_of

__all__ = [
    "Wrap",
    "check_wrapper",
    "dense_learns",
    "process_group_of",
    "unwrapped",
    "wrapped_like",
]

Wrap = Callable[[nn.Module], nn.Module]

MIB = 1 << 20

# Within a model, or around it, none of these can be taken off and put on again.
PARALLEL = (
    FullyShardedDataParallel,
    DataParallel,
    DistributedModelParallel,
    DistributedDataParallel,
)

# Those options of DDP that it keeps under their own names, in one release or another.
DDP_OPTIONS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "broadcast_buffers",
    "forward_sync_buffers",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its data-parallel wrapper; the model itself if it has none."""
    if isinstance(model, DistributedModelParallel | DistributedDataParallel):
        return model.module
    return model


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a wrapper averages; without one, those that the sites are told of."""
    if isinstance(model, DistributedModelParallel):
        return model._env.process_group
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    group = group_of(model)
    return None if group is None else group.resolve()


def dense_learns(module: nn.Module) -> bool:
    """Whether anything learns that is no table: with nothing, nothing is to be averaged."""
    tables = table_parameters(module)
    return any(p.requires_grad for p in module.parameters() if p not in tables)


def check_wrapper(model: nn.Module, wrap: Wrap | None) -> None:
    """Refuse what cannot be wrapped anew as it is.

    Raises:
        ValueError: If the model is compiled or in a wrapper other than DDP, FSDP's ``fully_shard``
            and ``DistributedModelParallel`` itself, or anything in it is.
    """
    kind = type(model)
    other = isinstance(model, DistributedModelParallel) and kind is not DistributedModelParallel
    if other and wrap is None:
        raise ValueError(
            f"StageDriver: model is a {kind.__name__} and wrap is None, but only "
            "DistributedModelParallel itself is known well enough to be wrapped anew at a "
            "boundary. Give wrap=, a function that wraps model.module."
        )
    if "_orig_mod" in dict(model.named_children()):
        raise ValueError(
            f"StageDriver: model is compiled (a {kind.__name__}), and what learns is compiled in. "
            "Give the model that is not, and compile it in wrap=, or compile the parts with "
            "module.compile()."
        )
    inside = unwrapped(model)
    for name, module in inside.named_modules():
        if isinstance(module, PARALLEL) or (isinstance(module, FSDPModule) and inside is not model):
            where = repr(name) if name else "its root"
            raise ValueError(
                f"StageDriver: {where} of the model is a {type(module).__name__}, which cannot be "
                "wrapped anew when what learns changes. Give the model in "
                "DistributedModelParallel, in DistributedDataParallel, in fully_shard alone or in "
                "no wrapper."
            )


def wrapped_like(model: nn.Module, wrap: Wrap | None = None) -> nn.Module:
    """Wrap anew what is inside ``model``, as that is wrapped; a collective call.

    Parameters and sharded tables stay the objects that they are.

    Args:
        model: In :class:`DistributedModelParallel`, in DDP, in ``fully_shard``, which stays as it
            is because a stage changes nothing that it has decided, or in no wrapper.
        wrap: What wraps in place of that.
    """
    module = unwrapped(model)
    if wrap is not None:
        return wrap(module)
    if isinstance(model, DistributedModelParallel):
        return DistributedModelParallel(
            module,
            env=model._env,
            device=model.device,
            plan=model.plan,
            sharders=model.sharders,
            init_data_parallel=dense_learns(module),
            data_parallel_wrapper=model._data_parallel_wrapper,
        )
    if isinstance(model, DistributedDataParallel):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module  # DDP refuses a model in which nothing learns
        return DistributedDataParallel(module, **_options_of(model))
    return module


def _options_of(ddp: DistributedDataParallel) -> dict[str, Any]:
    known, held = inspect.signature(DistributedDataParallel).parameters, vars(ddp)
    options = {name: held[name] for name in DDP_OPTIONS if name in known and name in held}
    if not ddp.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = ddp.bucket_bytes_cap // MIB
    return options
