"""The tensors of a checkpoint: by flat names, whole over ranks, copied to memory of the host."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

__all__ = ["OpenWindow", "Snapshot", "flatten", "sizes_over_ranks"]


@dataclass(frozen=True, kw_only=True)
class OpenWindow:
    """What was trained since the last line of the log, for the next line to be complete.

    Attributes:
        rows: This rank's predictions.
        choices: Of the routers, by site; of all ranks, and kept by the first one alone.
    """

    rows: Tensor
    choices: Mapping[str, Tensor] = field(default_factory=dict)


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


class Snapshot:
    """Copies on the host that do not change while training goes on.

    Their memory is kept for the next time: fresh memory would cost more than the copy.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of this rank's tensors; they are valid until the next call."""
        copies = {name: self._copy(name, value) for name, value in flat.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host were only queued
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
        # This constructor, unlike the public one, asks no other rank.
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards,
            replace(whole, shards_metadata=list(on_host.values())),
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
