"""A sharding plan, for people: which table is where, how large, and how long its lookups take."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_hilomoe.runtime.console import format_bytes
from torchrec_hilomoe.runtime.paths import to_json

__all__ = ["PlanReport", "TablePlan"]

COLUMNS = ("table", "rows", "width", "memory", "type", "kernel", "ranks", "est. ms")


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Where a table is.

    Attributes:
        collection: Name of the module that holds the table.
        table: Name of the table.
        rows: Number of rows.
        width: Number of columns.
        weight_bytes: Bytes of its weights alone.
        bytes: Bytes over all ranks with optimizer state and its share of a batch, as TorchRec
            estimates.
        type: Sharding type.
        kernel: Compute kernel, which says where its rows are.
        ranks: Ranks of its shards, in order.
        milliseconds: Milliseconds of its slowest shard in a step, lookup, exchange and update, as
            TorchRec estimates.
    """

    collection: str
    table: str
    rows: int
    width: int
    weight_bytes: int
    bytes: int
    type: str
    kernel: str
    ranks: tuple[int, ...]
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan, and what TorchRec estimates of it.

    Attributes:
        tables: Plans of the tables, the largest first.
        device: Kind of device, ``cpu`` or ``cuda``.
        capacity_bytes: Bytes of a rank that tables may use, without what is reserved.
        rank_bytes: Bytes of each rank's shards.
        rank_milliseconds: Milliseconds of each rank's shards in a step.
    """

    tables: tuple[TablePlan, ...]
    device: str
    capacity_bytes: int
    rank_bytes: tuple[int, ...]
    rank_milliseconds: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """The slowest rank's estimated time over the mean; 1 where all take the same."""
        mean = sum(self.rank_milliseconds) / len(self.rank_milliseconds)
        return max(self.rank_milliseconds) / mean if mean else 1.0

    def to_json(self) -> str:
        """The same as JSON, which :meth:`from_json` takes back."""
        return to_json(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PlanReport":
        """Parse what :meth:`to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        lists = {name: tuple(raw[name]) for name in ("rank_bytes", "rank_milliseconds")}
        return cls(**{**raw, **lists, "tables": tuple(map(_table, raw["tables"]))})

    def table_lines(self) -> list[str]:
        """A line of headings, then one for each table, with a column for each figure."""
        cells = [COLUMNS, *(_cells(table) for table in self.tables)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]

    def text(self) -> str:
        """Lines with a column for each figure, and one for each rank's load."""
        lines = self.table_lines()
        for rank, (held, busy) in enumerate(
            zip(self.rank_bytes, self.rank_milliseconds, strict=True)
        ):
            share = held / self.capacity_bytes
            lines.append(
                f"rank {rank}: {format_bytes(held)} of {format_bytes(self.capacity_bytes)} for "
                f"tables ({share:.1%}), est. {busy:.3f} ms a step"
            )
        lines.append(f"slowest rank over the mean: {self.imbalance:.2f}")
        return "\n".join(lines) + "\n"


def _table(raw: Mapping[str, Any]) -> TablePlan:
    return TablePlan(**{**raw, "ranks": tuple(raw["ranks"])})


def _cells(table: TablePlan) -> tuple[str, ...]:
    ranks = list(table.ranks)
    consecutive = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[0] + len(ranks)))
    return (
        f"{table.collection}.{table.table}",
        f"{table.rows:,}",
        str(table.width),
        format_bytes(table.bytes),
        table.type,
        table.kernel,
        f"{ranks[0]}-{ranks[-1]}" if consecutive else ",".join(map(str, ranks)),
        f"{table.milliseconds:.3f}",
    )
