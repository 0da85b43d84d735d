"""Encoded rows wait in scratch files, each cut by where its rows belong, and leave as Parquet.

A scratch file holds the rows of one raw piece: those of each split, and each shard, together. A
shard of training rows is a random share of them, small enough to be put in order in memory; so
training rows leave in a random order, whatever the number of rows, and the same one for any number
of threads.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.prepare.encoding import prepared_types
from torchrec_hilomoe.data.prepare.folder import PreparedFolder, ROW_GROUP_ROWS, Split
from torchrec_hilomoe.data.prepare.streaming import in_order
from torchrec_hilomoe.data.schema import Schema

__all__ = ["SPLITS", "Noted", "Shards", "shard_rows"]

SPLITS = ("train", "valid", "test")
SHARD_BYTES = 1 << 26
MOST_ROWS = 32 * ROW_GROUP_ROWS

logger = logging.getLogger(__name__)


def shard_rows(bytes_per_row: float) -> int:
    """Return how many rows a shard, which becomes a file, has: whole row groups that fit memory."""
    groups = int(SHARD_BYTES / max(bytes_per_row, 1)) // ROW_GROUP_ROWS
    return min(max(groups, 1) * ROW_GROUP_ROWS, MOST_ROWS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where rows of a shard are: those from ``start`` to ``stop`` of a scratch file's batch."""

    path: str
    batch: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def cut(self, rows: int) -> "list[_Place]":
        """Cut after some rows; whoever has none is left out."""
        border = min(self.start + rows, self.stop)
        both = (replace(self, stop=border), replace(self, start=border))
        return [place for place in both if place.rows]


@dataclass(frozen=True, kw_only=True)
class Noted:
    """What became of a piece's rows of one split.

    Attributes:
        split: Its name.
        places: Where they are, by shard.
        clicks: Among the rows.
        unknown: Ids of unknown values by table, among how many, and the rows of both.
    """

    split: str
    places: list[tuple[int, "_Place"]]
    clicks: int
    unknown: Mapping[str, Counter[str]]


@dataclass(kw_only=True)
class Shards:
    """Rows on their way to the prepared folder.

    Attributes:
        scratch: A local folder.
        seed: Of the order of rows in training shards.
        schema: What the rows' columns mean.
    """

    scratch: str
    seed: int
    schema: Schema
    _places: dict[tuple[str, int], list[_Place]] = field(default_factory=lambda: defaultdict(list))
    _clicks: Counter[str] = field(default_factory=Counter)
    _unknown: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    @property
    def unknown(self) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
        """For the report: by split and table, of tables with a vocabulary."""
        return {
            split: {table: dict(found) for table, found in sorted(tables.items())}
            for split, tables in self._unknown.items()
            if tables
        }

    def write(
        self,
        name: str,
        rows: pa.Table,
        split_N: np.ndarray,
        shard_N: np.ndarray,
    ) -> list[Noted]:
        """Write some rows, in whichever thread.

        Args:
            name: Of the scratch file, unique.
            rows: Of any splits.
            split_N: Which each row belongs to, an index into ``SPLITS``.
            shard_N: And to which shard, if it trains.

        Returns:
            What :meth:`note` is to be told, one after the other.
        """
        if not len(split_N):
            return []
        shard_N = np.where(split_N == SPLITS.index("train"), shard_N, 0)
        order = np.lexsort((shard_N, split_N))
        rows = rows.take(pa.array(order)).combine_chunks()
        keys_2N = np.stack([split_N, shard_N])[:, order]
        begins = 1 + np.flatnonzero((keys_2N[:, 1:] != keys_2N[:, :-1]).any(axis=0))
        path = os.path.join(self.scratch, f"{name}.rows")
        places: dict[int, list[tuple[int, _Place]]] = {}
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            for number, (start, stop) in enumerate(pairwise([0, *begins.tolist(), len(order)])):
                (batch,) = rows.slice(start, stop - start).to_batches()
                writer.write_batch(batch)
                split, shard = keys_2N[:, start].tolist()
                place = _Place(path=path, batch=number, start=0, stop=stop - start)
                places.setdefault(split, []).append((shard, place))
        noted = []
        first = 0
        for split, found in places.items():
            part = rows.slice(first, sum(place.rows for _, place in found))
            first += part.num_rows
            noted.append(
                Noted(
                    split=SPLITS[split],
                    places=found,
                    clicks=int(part[self.schema.label].to_numpy().sum()),
                    unknown=_count_unknown(part, self.schema),
                )
            )
        return noted

    def note(self, noted: "Noted") -> None:
        """Remember where rows are; called in the order of the raw rows."""
        self._clicks[noted.split] += noted.clicks
        tables = self._unknown.setdefault(noted.split, {})
        for table, found in noted.unknown.items():
            tables.setdefault(table, Counter()).update(found)
        for shard, place in noted.places:
            self._places[noted.split, shard].append(place)

    def write_splits(
        self, folder: PreparedFolder, *, rows_per_file: int, workers: int
    ) -> dict[str, Split]:
        """Write every split; arguments as in :meth:`write_split`."""
        return {
            split: self.write_split(folder, split, rows_per_file=rows_per_file, workers=workers)
            for split in SPLITS
        }

    def write_split(
        self, folder: PreparedFolder, split: str, *, rows_per_file: int, workers: int
    ) -> Split:
        """Write a split's Parquet files, which do not depend on how the rows came in pieces.

        Args:
            folder: Where to.
            split: Training rows leave in a random order, others in the order they came in.
            rows_per_file: How many rows a file has, about so many if they train.
            workers: Threads.

        Returns:
            What was written.
        """
        mix = split == "train"
        jobs = self._train_jobs() if mix else self._ordered_jobs(split, rows_per_file)

        def work(job: tuple[int, list[_Place]]) -> int:
            number, places = job
            tables = [_read(place) for place in places]
            whole = (
                pa.concat_tables(tables) if tables else prepared_types(self.schema).empty_table()
            )
            if mix:
                rng = np.random.default_rng([self.seed, number])
                whole = whole.take(pa.array(rng.permutation(whole.num_rows)))
            # In one chunk, because chunks show in the pages of the file.
            folder.write_part(split, number, whole.schema, [whole.combine_chunks()])
            return whole.num_rows

        written = in_order(
            enumerate(jobs or [[]]),
            work,
            workers=workers,
            title=split,
            unit="files",
            total=max(len(jobs), 1),
        )
        rows = sum(written)
        logger.info("%s: %d rows written", split, rows)
        return Split(rows=rows, label_rate=self._clicks[split] / rows if rows else None)

    def _train_jobs(self) -> list[list[_Place]]:
        shards = sorted(shard for split, shard in self._places if split == "train")
        return [self._places["train", shard] for shard in shards]

    def _ordered_jobs(self, split: str, rows_per_file: int) -> list[list[_Place]]:
        return list(_grouped(self._places.get((split, 0), []), rows_per_file))


def _count_unknown(rows: pa.Table, schema: Schema) -> dict[str, Counter[str]]:
    """Count unknown values by table, and what they are among; of lists, as far as kept."""
    found: dict[str, Counter[str]] = {}
    in_row: dict[str, np.ndarray] = {}
    for feature in schema.id_features:
        rule = schema.vocabularies.get(feature.table)
        if rule is None or rule.kind == "hashed":
            continue
        column = rows.column(feature.name).combine_chunks()
        is_list = pa.types.is_list(column.type)
        ids_T = column.flatten() if is_list else column
        unknown_T = np.flatnonzero(ids_T.to_numpy() == schema.unknown_id(feature.table))
        counts = found.setdefault(feature.table, Counter())
        counts.update({"unknown_ids": len(unknown_T), "ids": len(ids_T)})
        if is_list:
            ends_N = column.offsets.to_numpy()[1:] - column.offsets[0].as_py()
            unknown_T = np.searchsorted(ends_N, unknown_T, "right")
        in_row.setdefault(feature.table, np.zeros(rows.num_rows, dtype=bool))[unknown_T] = True
    for table, unknown_N in in_row.items():
        found[table].update({"rows_with_unknown": int(unknown_N.sum()), "rows": rows.num_rows})
    return found


def _grouped(places: Sequence[_Place], rows: int) -> Iterator[list[_Place]]:
    """Yield the places of ``rows`` rows each, and of what is left of them."""
    group: list[_Place] = []
    missing = rows
    for place in places:
        left = [place]
        while left:
            first, *left = left[0].cut(missing)
            group.append(first)
            missing -= first.rows
            if not missing:
                yield group
                group, missing = [], rows
    if group:
        yield group


def _read(place: _Place) -> pa.Table:
    # Copied from the map, which is closed here.
    with pa.OSFile(place.path) as source:
        batch = pa.ipc.open_file(source).get_batch(place.batch)
        return pa.Table.from_batches([batch.slice(place.start, place.rows)])
