"""A sharding plan, for people: which table is where, how large, and how long its lookups take."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["PlanReport", "TablePlan", "shown_bytes"]

COLUMNS = ("table", "rows", "width", "memory", "type", "kernel", "ranks", "est. ms")


def shown_bytes(amount: float) -> str:
    """Return an amount of memory as people write it.

    Example:
        >>> [shown_bytes(amount) for amount in (512, 1536, 80 * 2**30)]
        ['512 B', '1.5 KB', '80.0 GB']
    """
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TB"


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Where a table is.

    Attributes:
        collection: Its module.
        table: Its name.
        rows: How many.
        width: Of a row.
        weight_bytes: Of its rows alone.
        bytes: With its optimizer's state and its share of a batch, over all ranks, estimated.
        type: How it is cut.
        kernel: Where rows are.
        ranks: Of its shards, in order.
        milliseconds: Of its slowest shard in a step: lookup, exchange and update, estimated.
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
        tables: The largest first.
        device: ``cpu`` or ``cuda``.
        capacity_bytes: For tables, of a rank, what is reserved taken off.
        rank_bytes: Of each rank's shards.
        rank_milliseconds: Of each rank's shards in a step.
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
        return json.dumps(asdict(self), indent=2) + "\n"

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
                f"rank {rank}: {shown_bytes(held)} of {shown_bytes(self.capacity_bytes)} for "
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
        shown_bytes(table.bytes),
        table.type,
        table.kernel,
        f"{ranks[0]}-{ranks[-1]}" if consecutive else ",".join(map(str, ranks)),
        f"{table.milliseconds:.3f}",
    )
