"""Which table does not fit, and by how much."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import ShardingOption, Storage, Topology

__all__ = ["Shortage", "shortage_of"]

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """By how much tables do not fit.

    Attributes:
        table: The one that alone is too large for a rank however it is cut, or the largest.
        alone: Whether it is too large alone.
        way: How it is cut where it needs least.
        needed: Bytes: of a rank for that table, or of all ranks for all tables.
        available: Bytes: of a rank, or of all ranks, for tables.
        limit: Bytes that a rank has for tables.
        per_rank: Bytes that one must have for them, at the least.
        rows_per_rank: The same without what a batch needs.
        host: Whether it is the host's memory that is short.
    """

    table: str
    alone: bool
    way: str
    needed: int
    available: int
    limit: int
    per_rank: int
    rows_per_rank: int
    host: bool

    @property
    def excess(self) -> int:
        """Bytes that are missing; not above 0 where there is room and only no place."""
        return self.needed - self.available


def shortage_of(ways: Sequence[ShardingOption], topology: Topology) -> Shortage:
    """Find the table that is short, from all ways of cutting each."""
    capacity = topology.devices[0].storage
    by_table: dict[str, list[ShardingOption]] = {}
    for way in ways:
        by_table.setdefault(way.name, []).append(way)
    smallest = [
        min(options, key=lambda way: _total(way, topology)) for options in by_table.values()
    ]
    together = sum(_total(way, topology) for way in smallest)
    share = -(-together // topology.world_size)
    alone = []
    for table, options in by_table.items():
        best = min(options, key=lambda way: max(_missing(way, capacity)))
        on_device, on_host = _missing(best, capacity)
        host = on_host > on_device
        available = capacity.ddr if host else capacity.hbm
        missing = max(on_device, on_host)
        alone.append(
            Shortage(
                table=table,
                alone=True,
                way=best.sharding_type,
                needed=available + missing,
                available=available,
                limit=available,
                per_rank=max(available + missing, share),
                rows_per_rank=max(FLOAT * shard.size[0] * shard.size[1] for shard in best.shards),
                host=host,
            )
        )
    worst = max(alone, key=lambda it: it.excess)
    if worst.excess > 0:
        return worst
    largest = max(smallest, key=lambda way: _total(way, topology))
    host = topology.compute_device == "cpu" or not largest.total_storage.hbm
    limit = capacity.ddr if host else capacity.hbm
    return Shortage(
        table=largest.name,
        alone=False,
        way=largest.sharding_type,
        needed=together,
        available=topology.world_size * limit,
        limit=limit,
        per_rank=max(share, *(it.needed for it in alone)),
        rows_per_rank=sum(FLOAT * way.tensor.numel() for way in smallest) // topology.world_size,
        host=host,
    )


def _missing(way: ShardingOption, capacity: Storage) -> tuple[int, int]:
    """Bytes by which the largest shard exceeds the device's memory, and the host's."""
    storages = [shard.storage for shard in way.shards if shard.storage is not None]
    device = max(storage.hbm for storage in storages) - capacity.hbm
    return device, max(storage.ddr for storage in storages) - capacity.ddr


def _total(way: ShardingOption, topology: Topology) -> int:
    storage = way.total_storage
    return storage.ddr if topology.compute_device == "cpu" or not storage.hbm else storage.hbm
