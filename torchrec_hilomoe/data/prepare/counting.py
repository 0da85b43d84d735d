"""How often each value occurs, in memory that does not grow with the values.

Rare values are most of a log's distinct ones. When there are too many to keep, what was counted so
far goes to a file, cut by the values' hashes; in the end one cut at a time is added up, and only
what is frequent enough is kept.
"""

import os
from threading import Lock

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.hashing import hash64
from torchrec_hilomoe.data.prepare.arrow import call

__all__ = ["ValueCounts", "by_frequency"]

CUTS = 64
DISTINCT_IN_MEMORY = 1 << 22
PENDING = 1 << 20  # entries that are added up at once


class ValueCounts:
    """Counts the values of one column; threads may add at the same time.

    Args:
        scratch: A local folder for what memory cannot hold.
        name: Of its files there.
        limit: Distinct values that memory holds.
        kind: Of the values, in case there is none.
    """

    def __init__(
        self,
        scratch: str,
        name: str,
        *,
        limit: int = DISTINCT_IN_MEMORY,
        kind: pa.DataType | None = None,
    ) -> None:
        self._scratch = scratch
        self._name = name
        self._limit = limit
        self._kind = kind or pa.int64()
        self._lock = Lock()
        self._tables: list[pa.Table] = []
        self._pending = 0
        self._runs: list[str] = []

    def add(self, values: pa.Array | pa.ChunkedArray) -> None:
        """Count values; nulls do not count."""
        found = call("value_counts", call("drop_null", values))
        table = pa.table({"value": found.field(0), "count": found.field(1)})
        with self._lock:
            self._tables.append(table)
            self._pending += table.num_rows
            if self._pending > PENDING:
                self._add_up()

    def at_least(self, min_count: int) -> pa.Table:
        """Return ``value`` and ``count`` of the values that occurred so often, in no order."""
        with self._lock:
            self._add_up()
            parts = list(self._tables)
            if self._runs:
                parts = [_frequent(self._cut(cut, parts), min_count) for cut in range(CUTS)]
            if not parts:
                return pa.table(
                    {"value": pa.array([], self._kind), "count": pa.array([], pa.int64())}
                )
            return _frequent(pa.concat_tables(parts), min_count)

    def ranked(self) -> pa.Array:
        """Return all values, the most frequent first."""
        return by_frequency(self.at_least(1))

    def _add_up(self) -> None:
        self._pending = 0
        if not self._tables:
            return
        summed = _sum(self._tables)
        self._tables = [summed]
        if summed.num_rows > self._limit:
            self._spill(summed)
            self._tables = []

    def _spill(self, table: pa.Table) -> None:
        path = os.path.join(self._scratch, f"{self._name}-{len(self._runs):05d}.counts")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            for part in _cuts(table):
                writer.write_batch(
                    part.combine_chunks().to_batches()[0] if part.num_rows else _none(part)
                )
        self._runs.append(path)

    def _cut(self, cut: int, in_memory: list[pa.Table]) -> pa.Table:
        parts = [_cuts(table)[cut] for table in in_memory]
        for path in self._runs:
            with pa.memory_map(path) as source:
                batch = pa.ipc.open_file(source).get_batch(cut)
                parts.append(pa.Table.from_batches([batch]))
        return _sum(parts)


def by_frequency(counts: pa.Table) -> pa.Array:
    """Return each ``value``, that of the largest ``count`` first; ties are broken by value."""
    order = [("count", "descending"), ("value", "ascending")]
    return counts.sort_by(order)["value"].combine_chunks()


def _sum(tables: list[pa.Table]) -> pa.Table:
    whole = pa.concat_tables(tables)
    return whole.group_by("value").aggregate([("count", "sum")]).rename_columns(["value", "count"])


def _frequent(table: pa.Table, min_count: int) -> pa.Table:
    return table.filter(call("greater_equal", table["count"], min_count))


def _cuts(table: pa.Table) -> list[pa.Table]:
    cut_N = (hash64(table["value"].combine_chunks()) % np.uint64(CUTS)).astype(np.int64)
    ends = np.cumsum(np.bincount(cut_N, minlength=CUTS))
    table = table.take(pa.array(np.argsort(cut_N, kind="stable")))
    return [
        table.slice(stop - size, size)
        for stop, size in zip(ends, np.diff(ends, prepend=0), strict=True)
    ]


def _none(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=table.schema)
