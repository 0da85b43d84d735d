"""Over which ranks the auxiliary losses, reports and probes add up: all of them, or a group.

A model that is trained by some of a job's ranks must not wait for the others. A group is kept by
its name and its members, which a copy or a pickle of the model can hold; the process group itself,
which they cannot, is looked up when it is needed.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import _resolve_process_group

__all__ = ["RankGroup", "process_group_of", "size_of", "sum_over_ranks"]


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """A process group, as a model can keep it.

    Attributes:
        name: As PyTorch has registered it.
        members: Its ranks, counted over the job.
    """

    name: str
    members: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, caller: str) -> Self | None:
        """Keep a group; None are all ranks.

        Args:
            group: That this rank is in.
            caller: Who was given it, for the message.

        Raises:
            ValueError: If it is no process group, or this rank is not in it.
        """
        if group is None:
            return None
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{caller}: rank {dist.get_rank()} is not in the process_group that it was given. "
                "Give each rank the group that it is in."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"{caller}: process_group must be a torch.distributed.ProcessGroup or None, got a "
                f"{type(group).__name__}. Give what torch.distributed.new_group returned, or "
                "get_group() of a DeviceMesh."
            )
        members = tuple(dist.get_process_group_ranks(group))
        return cls(name=group.group_name, members=members)

    def __str__(self) -> str:
        """For messages."""
        return f"the process group of ranks {list(self.members)}"

    def resolve(self) -> dist.ProcessGroup:
        """Look up the process group.

        Raises:
            ValueError: If this process is not, or no longer, in such a group.
        """
        try:
            group = _resolve_process_group(self.name)  # pyright: ignore
            members = tuple(dist.get_process_group_ranks(group))
        except (KeyError, RuntimeError, ValueError):
            members = ()
        if members != self.members:
            raise ValueError(
                f"HiLoMoE adds up over {self}, named {self.name!r}, but that name means "
                f"{f'ranks {list(members)}' if members else 'no group'} in this process. Call "
                "set_process_group(model, group) with one that exists, or with None for all ranks."
            )
        return group


def process_group_of(group: RankGroup | None) -> dist.ProcessGroup | None:
    """What collectives of ``torch.distributed`` take; None are all ranks."""
    return None if group is None else group.resolve()


def size_of(group: RankGroup | None) -> int:
    """Number of ranks; 1 where there is no process group."""
    if group is not None:
        return len(group.members)
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor, group: RankGroup | None = None) -> Tensor:
    """Start to add up the values of ranks; reading the result waits for it."""
    if size_of(group) == 1:
        return values
    if group is not None:
        if not torch.compiler.is_compiling():  # a graph has the name alone
            group.resolve()
        return collectives.all_reduce(values, "sum", group.name)  # pyright: ignore
    world = dist.group.WORLD
    assert world is not None
    return collectives.all_reduce(values, "sum", world)
