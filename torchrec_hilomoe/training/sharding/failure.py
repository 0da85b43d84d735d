"""Why no plan can be made: which table, which limit, and what would help."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import ShardingOption, Topology

from torchrec_hilomoe.config.sharding import ShardingConfig
from torchrec_hilomoe.training.sharding.report import shown_bytes

__all__ = ["NoPlanError", "TableNeed", "why_not"]


class NoPlanError(ValueError):
    """Tables do not fit; the message says which, by what limit, and what would help.

    Args:
        message: For the user.
        ways: Every way of cutting every table that was allowed, with TorchRec's estimates.
        topology: The machine, less what is reserved.
    """

    def __init__(self, message: str, *, ways: Sequence[ShardingOption], topology: Topology) -> None:
        super().__init__(message)
        self.ways = ways
        self.topology = topology


@dataclass(frozen=True, kw_only=True)
class TableNeed:
    """What a table needs at the least.

    Attributes:
        table: Its name.
        rows: How many.
        width: Of a row.
        bytes: Over all ranks, with its optimizer's state and its share of a batch.
        largest_shard: The most that one rank needs for it.
        types: The ways of cutting it that were allowed.
    """

    table: str
    rows: int
    width: int
    bytes: int
    largest_shard: int
    types: tuple[str, ...]


def why_not(
    needs: Sequence[TableNeed], capacity: int, world_size: int, options: ShardingConfig
) -> str:
    """Say why tables do not fit.

    Args:
        needs: Of every table.
        capacity: What a rank has for tables, what is reserved taken off.
        world_size: Ranks.
        options: What the user wants.
    """
    limit = (
        f"a rank has {shown_bytes(capacity)} for tables (sharding.hbm = {options.hbm or 'null'}, "
        f"sharding.ddr = {options.ddr or 'null'}, less sharding.reserve = {options.reserve})"
    )
    help_by_memory = (
        "more ranks, more memory (sharding.hbm, sharding.ddr), a lower sharding.reserve, a smaller "
        "model.embedding_dim, vocabulary or train.batch_size"
    )
    largest = max(needs, key=lambda need: need.largest_shard)
    if largest.largest_shard > capacity:
        ways = " or ".join(largest.types)
        cut = "" if "row_wise" in largest.types else " row_wise for that table, where it trains;"
        return (
            f"sharding: table {largest.table!r} ({largest.rows:,} rows of {largest.width}) needs "
            f"{shown_bytes(largest.largest_shard)} on one rank even when it is cut {ways}, but "
            f"{limit}. What would help:{cut} {help_by_memory}."
        )
    total = sum(need.bytes for need in needs)
    first = sorted(needs, key=lambda need: -need.bytes)[:3]
    shown = ", ".join(f"{need.table!r} {shown_bytes(need.bytes)}" for need in first)
    pinned = [name for name, wanted in options.tables.items() if wanted.ranks is not None]
    freed = f" letting the planner place {', '.join(pinned)};" if pinned else ""
    return (
        f"sharding: the tables need {shown_bytes(total)} together on {world_size} ranks (largest: "
        f"{shown}), but {limit}, and no way was found to place them all. What would help:{freed} "
        f"{help_by_memory}."
    )
