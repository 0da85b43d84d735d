"""How often each value occurs, in memory that does not grow with the values.

Rare values are most of a log's distinct ones. When there are too many to keep, what was counted so
far goes to files, cut by the values' hashes; in the end one cut at a time is added up, and only
what is frequent enough is kept. Polars' own streaming ``group_by`` keeps all distinct values: 20
million of them took 1.2 GB.
"""

import os
from pathlib import Path
from threading import Lock

import polars as pl

__all__ = ["ValueCounts", "by_frequency"]

CUTS = 64
DISTINCT_IN_MEMORY = 1 << 22
PENDING = 1 << 20  # entries that are added up at once


class ValueCounts:
    """Counts the values of one column; threads may add at the same time.

    Args:
        scratch: A local folder for what memory cannot hold.
        name: Of its files there.
        kind: Of the values, in case there is none.
    """

    def __init__(self, scratch: str, name: str, *, kind: type[pl.DataType] = pl.Int64) -> None:
        self._path = os.path.join(scratch, name)
        self._kind = kind
        self._lock = Lock()
        self._frames: list[pl.DataFrame] = []
        self._pending = 0
        self._runs = 0

    def add(self, values: pl.Series) -> None:
        """Count values; nulls do not count."""
        found = values.alias("value").drop_nulls().cast(self._kind).value_counts(name="count")
        with self._lock:
            self._frames.append(found)
            self._pending += found.height
            if self._pending > PENDING:
                self._frames, self._pending = [_sum(pl.concat(self._frames))], 0
                if self._frames[0].height > DISTINCT_IN_MEMORY:
                    self._spill()

    def at_least(self, min_count: int) -> pl.DataFrame:
        """Return ``value`` and ``count`` of the values that occurred so often, in no order."""
        nothing = pl.DataFrame(schema={"value": self._kind, "count": pl.UInt32})
        whole = pl.concat([nothing, *self._frames])
        enough = pl.col("count") >= min_count
        if not self._runs:
            return _sum(whole).filter(enough)
        self._frames = [whole]
        self._spill()
        folder, name = os.path.split(self._path)
        cuts = (sorted(Path(folder).glob(f"{name}-*-{cut}.counts")) for cut in range(CUTS))
        return pl.concat(
            _sum(pl.concat(map(_read, files))).filter(enough) for files in cuts if files
        )

    def ranked(self) -> pl.Series:
        """Return all values, the most frequent first."""
        return by_frequency(self.at_least(1))

    def _spill(self) -> None:
        cut = (pl.col("value").hash(0) % CUTS).alias("cut")
        parts = pl.concat(self._frames).with_columns(cut).partition_by("cut", as_dict=True)
        for (number,), part in parts.items():
            part.drop("cut").write_ipc(f"{self._path}-{self._runs:05d}-{number}.counts")
        self._frames, self._runs = [], self._runs + 1


def by_frequency(counts: pl.DataFrame) -> pl.Series:
    """Return each ``value``, that of the largest ``count`` first; ties are broken by value."""
    return counts.sort("count", "value", descending=[True, False])["value"]


def _read(path: Path) -> pl.DataFrame:
    return pl.read_ipc(path)


def _sum(counts: pl.DataFrame) -> pl.DataFrame:
    # In memory at once, it took 190 bytes an entry; the streaming engine takes about half.
    total = counts.lazy().group_by("value").agg(pl.col("count").sum())
    return total.collect(engine="streaming")
