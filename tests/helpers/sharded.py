"""Between a sharded model and a whole one: the same weights in, every rank's part out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.helpers.datasets import SCHEMA
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.assemble import assemble, Assembly

__all__ = ["Part", "assembled", "flat", "joined", "load_whole", "parts"]


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor.

    Attributes:
        values: A copy.
        offsets: Where in the whole it lies.
        size: Of the whole.
    """

    values: Tensor
    offsets: tuple[int, ...]
    size: tuple[int, ...]


def assembled(config: RunConfig) -> Assembly:
    """The toy model on the ranks of the job that this process has joined."""
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    context = DistributedContext(world=world, device=torch.device("cpu"))
    return assemble(config, build_task(config.model, SCHEMA), context)


def flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested state by dotted names."""
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        nested = isinstance(value, Mapping)
        tensors |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return tensors


def parts(state: Mapping[str, Any]) -> dict[str, list[Part]]:
    """This rank's parts of every tensor; a replicated one is one part, its whole."""
    found: dict[str, list[Part]] = {}
    for name, value in flat(state).items():
        if isinstance(value, ShardedTensor):
            found[name] = [
                Part(shard.tensor.clone(), tuple(shard.metadata.shard_offsets), tuple(value.size()))
                for shard in value.local_shards()
            ]
        else:
            found[name] = [Part(value.clone(), (0,) * value.dim(), tuple(value.shape))]
    return found


def joined(ranks: Sequence[Mapping[str, list[Part]]]) -> dict[str, Tensor]:
    """The whole tensors that the ranks hold together; every element must be there."""
    whole: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}
    for rank in ranks:
        for name, held in rank.items():
            for part in held:
                if name not in whole:
                    whole[name] = torch.empty(part.size, dtype=part.values.dtype)
                    missing[name] = torch.ones(part.size, dtype=torch.bool)
                where = zip(part.offsets, part.values.shape, strict=True)
                index = tuple(slice(at, at + length) for at, length in where)
                whole[name][index] = part.values
                missing[name][index] = False
    assert not [name for name, where in missing.items() if where.any()]
    return whole


def load_whole(model: DistributedModelParallel, whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, by the names of the model's state, into what this rank holds of them."""
    state = model.state_dict()
    assert state.keys() == whole.keys()
    with torch.no_grad():
        for name, value in state.items():
            if not isinstance(value, ShardedTensor):
                value.copy_(whole[name])
                continue
            for shard in value.local_shards():
                where = zip(shard.metadata.shard_offsets, shard.tensor.shape, strict=True)
                index = tuple(slice(at, at + length) for at, length in where)
                shard.tensor.copy_(whole[name][index])
