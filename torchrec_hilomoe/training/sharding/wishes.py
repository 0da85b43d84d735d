"""What a user wants of tables, checked against the machine and the model before it is planned."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torchrec_hilomoe.config.sharding import ShardingConfig, TableSharding
from torchrec_hilomoe.training.sharding.capabilities import CAPABILITIES

__all__ = ["Machine", "Table", "check_tables"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a job runs on.

    Attributes:
        world_size: Ranks.
        local_world_size: Ranks of a host.
        device: ``cpu`` or ``cuda``.
    """

    world_size: int
    local_world_size: int
    device: str


@dataclass(frozen=True)
class Table:
    """A table's kind and size."""

    pooled: bool
    rows: int
    width: int
    features: tuple[str, ...]


def check_tables(tables: Mapping[str, Table], machine: Machine, options: ShardingConfig) -> None:
    """Refuse wishes that cannot be fulfilled.

    Raises:
        ValueError: Naming the table, the option and what would do.
    """
    capability = CAPABILITIES[machine.device]
    for name, wanted in options.tables.items():
        where = f"sharding.tables.{name}"
        if name not in tables:
            near = get_close_matches(name, tables, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(tables)}."
            raise ValueError(f"{where}: the model has no table {name!r}. {hint}")
        types = capability.pooled if tables[name].pooled else capability.unpooled
        names = [kind.value for kind in types]
        kind = "pooled" if tables[name].pooled else "sequence"
        if wanted.type is not None and wanted.type not in names:
            raise ValueError(
                f"{where}: type {wanted.type!r} does not train a {kind} table on {machine.device}; "
                f"use one of {', '.join(names)}, or null."
            )
        if wanted.kernel is not None and wanted.kernel not in capability.kernels:
            raise ValueError(
                f"{where}: kernel {wanted.kernel!r} does not exist on {machine.device}; use "
                f"{' or '.join(capability.kernels)}, or null."
            )
        _check_ranks(where, wanted, tables[name], machine)


def _check_ranks(where: str, wanted: TableSharding, table: Table, machine: Machine) -> None:
    ranks = wanted.ranks or ()
    if ranks and max(ranks) >= machine.world_size:
        raise ValueError(
            f"{where}: ranks = {ranks} names rank {max(ranks)}, but the job has ranks 0 to "
            f"{machine.world_size - 1}."
        )
    if wanted.type == "column_wise" and len(ranks) > 1 and table.width % (4 * len(ranks)):
        raise ValueError(
            f"{where}: width {table.width} cannot be cut into {len(ranks)} columns that are "
            "multiples of 4, which FBGEMM's kernels want; name another number of ranks."
        )
