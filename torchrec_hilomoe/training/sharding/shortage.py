"""Why no sharding plan can be made: which table does not fit, by how much, and what would help."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Storage, Topology

from torchrec_hilomoe.config.sharding import ShardingConfig
from torchrec_hilomoe.runtime.console import format_bytes

__all__ = ["NoPlanError", "Shortage", "shortage_of"]

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """By how much tables do not fit.

    Attributes:
        table: The table that alone is too large for a rank however it is cut, or the largest one.
        rows: Rows of that table.
        width: Numbers in a row of it.
        alone: Whether that table is too large by itself.
        sharding_type: The way to cut it that needs least.
        world_size: Ranks.
        needed: Bytes of a rank for that table, or of all ranks for all tables.
        available: Bytes of a rank for tables, or of all ranks.
        limit: Bytes of a rank for tables.
        per_rank: Bytes that a rank must have for tables, at the least.
        rows_per_rank: Bytes that a rank must have for the rows alone, without what a batch needs.
        host: Whether host memory is short, not that of the device.
    """

    table: str
    rows: int
    width: int
    alone: bool
    sharding_type: str
    world_size: int
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

    def text(self, options: ShardingConfig) -> str:
        """Say in a sentence what does not fit, and by how much.

        Args:
            options: The memory that the user has given.
        """
        table = f"table {self.table!r} ({self.rows:,} rows of {self.width})"
        memory = "host memory" if self.host else "memory"
        limits = (
            f"(sharding.hbm = {options.hbm or 'null'}, sharding.ddr = {options.ddr or 'null'}, "
            f"less sharding.reserve = {options.reserve})"
        )
        needed, available = format_bytes(self.needed), format_bytes(self.available)
        more = f"{format_bytes(self.excess)} more than"
        if self.alone:
            return (
                f"{table} needs {needed} of {memory} on one rank even when it is cut "
                f"{self.sharding_type}, {more} the {available} that a rank has for tables {limits}."
            )
        over = more if self.excess > 0 else "and no way was found to place them all in"
        return (
            f"the tables need {needed} of {memory} together, {over} the {available} that "
            f"{self.world_size} ranks have for tables {limits}. The largest is {table}."
        )


class NoPlanError(ValueError):
    """Tables do not fit; the message says which, by what limit, and what might help.

    Args:
        shortage: What is missing.
        options: The user's.
    """

    def __init__(self, shortage: Shortage, options: ShardingConfig) -> None:
        pinned = [name for name, wanted in options.tables.items() if wanted.ranks is not None]
        if shortage.alone:
            pinned = [shortage.table] if shortage.table in options.tables else []
        free = f"no constraint on {', '.join(pinned)} (sharding.tables), " if pinned else ""
        super().__init__(
            f"sharding: {shortage.text(options)} What would help: {free}more ranks, more memory "
            "(sharding.hbm, sharding.ddr), a lower sharding.reserve, a smaller "
            "model.embedding_dim, vocabulary or train.batch_size. python -m torchrec_hilomoe plan "
            "tries each."
        )
        self.shortage = shortage


def shortage_of(options: Sequence[ShardingOption], topology: Topology) -> Shortage:
    """Find the table that does not fit.

    Args:
        options: Every way to cut every table that was allowed, with TorchRec's estimates.
        topology: The machine, less what is reserved.
    """
    capacity = topology.devices[0].storage
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)
    smallest = [
        min(sharding_options, key=lambda option: _total(option, topology))
        for sharding_options in by_table.values()
    ]
    together = sum(_total(option, topology) for option in smallest)
    share = -(-together // topology.world_size)
    alone = []
    for sharding_options in by_table.values():
        best = min(sharding_options, key=lambda option: max(_missing(option, capacity)))
        on_device, on_host = _missing(best, capacity)
        host = on_host > on_device
        available = capacity.ddr if host else capacity.hbm
        missing = max(on_device, on_host)
        alone.append(
            Shortage(
                **_described(best, topology),
                alone=True,
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
    largest = max(smallest, key=lambda option: _total(option, topology))
    host = topology.compute_device == "cpu" or not largest.total_storage.hbm
    limit = capacity.ddr if host else capacity.hbm
    return Shortage(
        **_described(largest, topology),
        alone=False,
        needed=together,
        available=topology.world_size * limit,
        limit=limit,
        per_rank=max(share, *(it.needed for it in alone)),
        rows_per_rank=sum(FLOAT * option.tensor.numel() for option in smallest)
        // topology.world_size,
        host=host,
    )


def _described(option: ShardingOption, topology: Topology) -> dict[str, Any]:
    rows, width = option.tensor.shape
    return {
        "table": option.name,
        "rows": rows,
        "width": width,
        "sharding_type": option.sharding_type,
        "world_size": topology.world_size,
    }


def _missing(option: ShardingOption, capacity: Storage) -> tuple[int, int]:
    """Bytes by which the largest shard exceeds the device's memory, and the host's."""
    storages = [shard.storage for shard in option.shards if shard.storage is not None]
    device = max(storage.hbm for storage in storages) - capacity.hbm
    return device, max(storage.ddr for storage in storages) - capacity.ddr


def _total(option: ShardingOption, topology: Topology) -> int:
    storage = option.total_storage
    return storage.ddr if topology.compute_device == "cpu" or not storage.hbm else storage.hbm
