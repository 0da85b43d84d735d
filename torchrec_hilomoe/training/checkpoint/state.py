"""The tensors of a checkpoint: by flat names, whole over ranks, copied to memory of the host."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.staging import AsyncStager

__all__ = [
    "CHOICES",
    "OF_A_RANK",
    "PROBE",
    "CPUStager",
    "device_rng",
    "flatten",
    "sizes_over_ranks",
]

CHOICES, PROBE = "choices.", "probe."
# Tensors that belong to one rank, not to the model: a rank of another job may have none. A window
# is the predictions since the last line of the log; choices are the routers', of all ranks; a probe
# is what `InteractionProbe.state_dict` has, what its ranks share from the first one alone.
OF_A_RANK = ("rng.", "rng_device.", "window.", CHOICES, PROBE)


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tensors by dotted names; views, not copies."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def sizes_over_ranks(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Join the ranks' tensors: optimizer state is known only where a table has a shard."""
    parts: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, {name: tuple(value.size()) for name, value in flat.items()})
    return {name: size for part in parts for name, size in part.items()}


def device_rng() -> Tensor | None:
    """Return the random state of this rank's GPU, if it has one."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


class CPUStager(AsyncStager):
    """Copies on the host that do not change while training goes on, for ``dcp.async_save``.

    Their memory is kept for the next time: fresh memory would cost more than the copy. Of torch
    2.13's own stagers ``DefaultStager`` raises on a ``ShardedTensor``, and ``BlockingAsyncStager``
    allocates anew each time, so that training waits about ten times as long; if it keeps its
    memory, it wants pinned memory, also without a GPU, and tensors that never change their size.

    Attributes:
        ended: Time at which the last copy was done, as ``time.perf_counter`` tells it.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        self._held: dict[str, Tensor] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Never: a copy is complete when it is returned."""
        return False

    def stage(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of this rank's tensors; they are valid until the next call."""
        copies = {name: self._copy(name, value) for name, value in state_dict.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host were only queued
        self.ended = time.perf_counter()
        return copies

    def _copy(self, name: str, value: Any) -> Any:
        if not isinstance(value, ShardedTensor):
            return self._host(name, value)
        whole = value.metadata()
        on_host = {_key(part): _on_host(part) for part in whole.shards_metadata}
        shards = [
            Shard(
                tensor=self._host(f"{name}/{_key(shard.metadata)}", shard.tensor),
                metadata=on_host[_key(shard.metadata)],
            )
            for shard in value.local_shards()
        ]
        pinned = any(shard.tensor.is_pinned() for shard in shards)
        kept = replace(whole.tensor_properties, pin_memory=pinned)
        # This constructor, unlike the public one, asks no other rank.
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards,
            replace(whole, shards_metadata=list(on_host.values()), tensor_properties=kept),
            process_group=value._process_group,
        )

    def _host(self, key: str, tensor: Tensor) -> Tensor:
        held = self._held.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._held[key] = held
        return held.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def _key(shard: ShardMetadata) -> str:
    return ",".join(map(str, shard.shard_offsets))


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    placement = shard.placement
    assert placement is not None
    return replace(
        shard, placement=torch.distributed._remote_device(f"rank:{placement.rank()}/cpu")
    )
