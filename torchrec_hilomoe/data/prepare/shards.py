"""Encoded rows wait in scratch files, each cut by where its rows belong, and leave as Parquet.

A scratch file holds the rows of one raw piece: those of each shard together. A shard of training
rows is a random share of them, small enough to be put in order in memory; so training rows leave in
a random order, whatever the number of rows, and the same one for any number of threads.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.prepare.folder import PreparedFolder, ROW_GROUP_ROWS, Split

__all__ = ["Noted", "Shards", "shard_rows"]

SHARD_BYTES = 1 << 26
MOST_ROWS = 32 * ROW_GROUP_ROWS


def shard_rows(bytes_per_row: float) -> int:
    """Return how many rows a shard, which becomes a file, has: whole row groups that fit memory."""
    groups = int(SHARD_BYTES / max(bytes_per_row, 1)) // ROW_GROUP_ROWS
    return min(max(groups, 1) * ROW_GROUP_ROWS, MOST_ROWS)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where some rows of a shard are: a batch of a scratch file."""

    path: str
    batch: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Noted:
    """What became of a piece's rows of one split.

    Attributes:
        split: Its name.
        places: What :meth:`Shards.write` returned.
        clicks: Among the rows.
        unknown: Ids of unknown values, by table.
    """

    split: str
    places: list[tuple[int, "_Place"]]
    clicks: int
    unknown: Mapping[str, int]


@dataclass(kw_only=True)
class Shards:
    """Rows on their way to the prepared folder.

    Attributes:
        scratch: A local folder.
        seed: Of the order of rows in training shards.
    """

    scratch: str
    seed: int
    _places: dict[tuple[str, int], list[_Place]] = field(default_factory=lambda: defaultdict(list))
    _clicks: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def write(self, name: str, rows: pa.Table, shard_N: np.ndarray) -> list[tuple[int, _Place]]:
        """Write a piece's rows, in whichever thread.

        Args:
            name: Of the scratch file, unique.
            rows: Of the piece.
            shard_N: Which shard each row belongs to.

        Returns:
            What :meth:`note` is to be told.
        """
        path = os.path.join(self.scratch, f"{name}.rows")
        rows = rows.take(pa.array(np.argsort(shard_N, kind="stable")))
        shards, counts = np.unique(shard_N, return_counts=True)
        places = []
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            for number, (shard, stop, size) in enumerate(
                zip(shards.tolist(), np.cumsum(counts).tolist(), counts.tolist(), strict=True)
            ):
                part = rows.slice(stop - size, size).combine_chunks()
                (batch,) = part.to_batches()
                writer.write_batch(batch)
                places.append((shard, _Place(path=path, batch=number, rows=size)))
        return places

    def note(self, noted: "Noted") -> None:
        """Remember where rows are; called in the order of the raw rows."""
        self._clicks[noted.split] += noted.clicks
        for shard, place in noted.places:
            self._places[noted.split, shard].append(place)

    def write_split(
        self,
        folder: PreparedFolder,
        split: str,
        *,
        columns: pa.Schema,
        rows_per_file: int,
        workers: int,
    ) -> Split:
        """Write a split's Parquet files.

        Args:
            folder: Where to.
            split: Training rows leave in a random order, others in the order they came in.
            columns: Of a split without a row.
            rows_per_file: About how many rows a file has.
            workers: Threads.

        Returns:
            What was written.
        """
        jobs = self._train_jobs() if split == "train" else self._ordered_jobs(split, rows_per_file)

        def work(number: int, places: list[_Place], mix: bool) -> int:
            tables = [_read(place) for place in places]
            whole = pa.concat_tables(tables) if tables else columns.empty_table()
            if mix:
                rng = np.random.default_rng([self.seed, number])
                whole = whole.take(pa.array(rng.permutation(whole.num_rows)))
            folder.write_part(split, number, whole.schema, [whole])
            return whole.num_rows

        with ThreadPoolExecutor(workers) as pool:
            futures = [
                pool.submit(work, number, places, split == "train")
                for number, places in enumerate(jobs or [[]])
            ]
            rows = sum(future.result() for future in futures)
        return Split(rows=rows, label_rate=self._clicks[split] / rows if rows else None)

    def _train_jobs(self) -> list[list[_Place]]:
        shards = sorted(shard for split, shard in self._places if split == "train")
        return [self._places["train", shard] for shard in shards]

    def _ordered_jobs(self, split: str, rows_per_file: int) -> list[list[_Place]]:
        return list(_grouped(self._places.get((split, 0), []), rows_per_file))


def _grouped(places: list[_Place], rows: int) -> Iterator[list[_Place]]:
    group: list[_Place] = []
    for place in places:
        group.append(place)
        if sum(one.rows for one in group) >= rows:
            yield group
            group = []
    if group:
        yield group


def _read(place: _Place) -> pa.Table:
    # Copied from the map, which is closed here.
    with pa.OSFile(place.path) as source:
        return pa.Table.from_batches([pa.ipc.open_file(source).get_batch(place.batch)])
