"""The process group that a launcher started, or one of this process alone."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from torchrec_hilomoe.runtime.world import World

__all__ = [
    "DistributedContext",
    "PeerLostError",
    "broadcast_text",
    "init_distributed",
    "pg_timeout",
]

# A rank that is dead is noticed at once, by its closed connections; a silent one by this.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
FOREVER = timedelta(days=365)
# What gloo, NCCL and the store say when another rank has ended.
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection was likely closed|connection refused"
    r"|remote process exited|read timeout|timed out waiting|recvValue failed|heartbeat|peer closed",
    re.IGNORECASE,
)


class PeerLostError(RuntimeError):
    """Another rank of the job has ended, or does not answer."""


def pg_timeout(stall_seconds: float | None) -> timedelta:
    """Return the timeout of the process group, longer than that of the watchdog."""
    return FOREVER if stall_seconds is None else timedelta(seconds=60 + 2 * stall_seconds)


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """This process among the ranks of a job.

    Attributes:
        world: Rank and number of ranks.
        device: Device of this rank.
    """

    world: World
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.world.rank == 0


@contextmanager
def init_distributed(
    device: str = "auto", *, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Iterator[DistributedContext]:
    """Initialise the process group of ``torchrun`` or TorchX, or form a group of one.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: a GPU when there is one.
        timeout: How long a rank waits for the others before it gives up.

    Raises:
        ValueError: If ``cuda`` is asked for and there is none.
        PeerLostError: If another rank ends, or is silent for too long, while this one waits for it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device is 'cuda', but PyTorch sees no GPU here. Use 'auto' or 'cpu', or check "
            "the installation with: python -m torchrec_hilomoe.doctor"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # TorchRec's planner reads it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedContext(
            world=World(rank=dist.get_rank(), size=dist.get_world_size()), device=here
        )
    except RuntimeError as error:
        if dist.get_world_size() > 1 and LOST.search(str(error)):
            raise PeerLostError(
                "another rank has ended or does not answer, so this one ends too; that rank's own "
                f"message says why. ({' '.join(str(error).split())[:200]})"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def broadcast_text(text: str | None) -> str:
    """Return rank 0's ``text`` on every rank."""
    holder = [text]
    dist.broadcast_object_list(holder, src=0)
    assert holder[0] is not None
    return holder[0]
