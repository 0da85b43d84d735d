"""Bytes that ranks send each other, counted from the collectives that are really called.

Every collective is an operation of PyTorch's dispatcher, whether TorchRec or DDP calls it and in
whichever pass, and is seen there with its tensors. What it counts is what this rank sends to
others, with the algorithms that are usual: an all-to-all sends all but the own part; a ring sends
``2 (N - 1) / N`` of an all-reduce and ``(N - 1) / N`` of a reduce-scatter's input, or of an
all-gather's output.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic", "sent_bytes"]


class Traffic(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        sent: Bytes that this rank has sent to others, by kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Take note and go on."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in NOTHING_SENT:
                assert name in SENT, f"do not know what c10d.{name} sends"
                kind, count = SENT[name]
                self.sent[kind] += round(count(args, dist.get_world_size()))
        return func(*args, **(kwargs or {}))


def sent_bytes(step: Callable[[], object]) -> dict[str, int]:
    """Return what all ranks together send in one call of ``step``; a collective call."""
    with Traffic() as traffic:
        step()
    kinds = sorted({kind for kind, _ in SENT.values()})
    sent = torch.tensor([traffic.sent[kind] for kind in kinds])
    dist.all_reduce(sent)
    return {kind: int(of_kind) for kind, of_kind in zip(kinds, sent, strict=True) if of_kind}


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _all_to_all(args: Any, ranks: int) -> float:
    sent, splits = args[1], args[4]
    if not splits:
        return _bytes(sent) * (ranks - 1) / ranks
    row = _bytes(sent) / max(1, sent.shape[0])
    return row * (sum(splits) - splits[dist.get_rank()])


def _listed_all_to_all(args: Any, ranks: int) -> float:
    return _bytes(args[1]) - _bytes(args[1][dist.get_rank()])


def _share(of: int, times: int) -> Callable[[Any, int], float]:
    """Of the argument at place ``of``, ``times (N - 1) / N``."""
    return lambda args, ranks: _bytes(args[of]) * times * (ranks - 1) / ranks


NOTHING_SENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_")
SENT: Mapping[str, tuple[str, Callable[[Any, int], float]]] = MappingProxyType(
    {
        "alltoall_base_": ("all_to_all", _all_to_all),
        "alltoall_": ("all_to_all", _listed_all_to_all),
        "allreduce_": ("all_reduce", _share(0, 2)),
        "allreduce_coalesced_": ("all_reduce", _share(0, 2)),
        "_allgather_base_": ("all_gather", _share(0, 1)),
        "allgather_": ("all_gather", _share(0, 1)),
        "allgather_into_tensor_coalesced_": ("all_gather", _share(0, 1)),
        "_reduce_scatter_base_": ("reduce_scatter", _share(1, 1)),
        "reduce_scatter_": ("reduce_scatter", _share(1, 1)),
        "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _share(1, 1)),
        "broadcast_": ("broadcast", _share(0, 1)),
    }
)
