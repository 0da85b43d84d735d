"""A log of events, such as purchases, becomes a prepared folder: a row needs its user's past.

    raw rows ─read→ events, sorted by user in runs ─parts of users→ counted, then encoded
      ─shards→ Parquet

Memory holds vocabularies, which the model holds too, some batches, and for each thread a part. A
data set is an :class:`EventLog`. What it gives depends on whole users only, so what is written is
the same for any number of threads and parts.

Shape legend:
    R  rows of a part
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Unpack

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.counting import ValueCounts
from torchrec_hilomoe.data.prepare.encoding import prepared_types
from torchrec_hilomoe.data.prepare.event_runs import EventRuns, Part
from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report, scratch_folder
from torchrec_hilomoe.data.prepare.options import check_least, Common, Options
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.shards import Noted, shard_rows, Shards
from torchrec_hilomoe.data.prepare.sources import RawFile
from torchrec_hilomoe.data.prepare.split_rules import check_splits, waiting_shard
from torchrec_hilomoe.data.prepare.streaming import in_order
from torchrec_hilomoe.data.prepare.vectors import Vectors, write_vectors
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

__all__ = [
    "Counted",
    "Encoded",
    "EventLog",
    "Learned",
    "Read",
    "Tally",
    "history_group",
    "prepare_log",
]

logger = logging.getLogger(__name__)

ENCODED_BYTES = 1 << 24  # about so much is made of a part at once


@dataclass(frozen=True, kw_only=True)
class Read:
    """A batch of the raw file.

    Attributes:
        events: Of good records.
        good: How many records those are.
        bad: The other records: where each is, and what is there.
    """

    events: pl.DataFrame
    good: int
    bad: Sequence[tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts that add up over users.

    Attributes:
        rows: That the events become.
        trained: Of them, those that train.
        entries: Of all their lists.
        numbered: What gets numbers in order, such as users or requests.
        longest: The most entries of a list that nobody cuts; the largest of all users counts.
        notes: For the report.
    """

    rows: int = 0
    trained: int = 0
    entries: int = 0
    numbered: int = 0
    longest: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        notes = Counter(self.notes)
        notes.update(other.notes)  # unlike a sum of counters, keeps zeros
        return Tally(
            rows=self.rows + other.rows,
            trained=self.trained + other.trained,
            entries=self.entries + other.entries,
            numbered=self.numbered + other.numbered,
            longest=max(self.longest, other.longest),
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Some users' events.

    Attributes:
        tally: What they come to.
        values: Those that count, by the names in :attr:`EventLog.counted`.
    """

    tally: Tally
    values: Mapping[str, pl.Series]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What is known once all users are counted.

    Attributes:
        schema: What the columns mean.
        vocabularies: Raw values of tables that the schema names files of, that with id 1 first.
        vectors: Of frozen tables; their keys are among the vocabularies.
        notes: Counts for the report that do not add up over users.
    """

    schema: Schema
    vocabularies: Mapping[str, pl.Series] = field(default_factory=dict)
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Some users' events as ids, from which rows are made when they are written.

    Attributes:
        split_R: Index into ``shards.SPLITS`` of each row.
        rows: Makes the columns of those from ``start`` to ``stop``.
    """

    split_R: np.ndarray
    rows: Callable[[int, int], dict[str, Any]]


class EventLog(ABC):
    """How a data set's raw records become events, and some users' events become rows.

    Attributes:
        file: Where the records are.
        columns: Those of the file that are needed, and the types that they are read as.
        order: Columns of events that put them in order: the user first; the last one tells any two
            events apart.
        nothing: What to tell whoever names a file without any event.
        counted: What is counted, and the type of its values.
        records: Good ones of smaller files.
    """

    file: RawFile
    columns: pa.Schema
    order: tuple[str, ...]
    nothing: str
    counted: Mapping[str, type[pl.DataType]]
    records: int = 0

    @abstractmethod
    def read(self, batch: pl.DataFrame) -> Read:
        """Read a batch of the file's rows, in whichever thread."""

    @abstractmethod
    def finish_reading(self, bad: BadRecords) -> None:
        """Read smaller files, once all rows are read.

        Args:
            bad: Is told of malformed records.

        Raises:
            DataError: If there is nothing to count, or a file is unreadable.
        """

    @abstractmethod
    def count(self, events: pl.DataFrame) -> Counted:
        """Count some users' events, sorted, in whichever thread."""

    @abstractmethod
    def learn(self, ranked: Mapping[str, pl.Series], total: Tally) -> Learned:
        """Take what was counted.

        Args:
            ranked: All values, the most frequent first.
            total: What all users come to.
        """

    @abstractmethod
    def encode(self, events: pl.DataFrame, before: Tally) -> Encoded:
        """Encode some users' events, in whichever thread.

        Args:
            events: All of them, sorted.
            before: What the users before these came to.
        """


def prepare_log(
    open_log: Callable[[str, int], EventLog],
    *,
    lengths: Mapping[str, int],
    named: Mapping[str, Any] | None = None,
    **common: Unpack[Common],
) -> Report:
    """Check what every such data set's options have in common, read, count, encode, and write.

    Args:
        open_log: Finds the raw files; is given a local folder, and the seed of what is drawn.
        lengths: Options that limit lists, which a list of one would make plain columns.
        named: Further ones that change the result, for the report.
        common: Options that every command has.
    """
    check_least(2, **lengths)
    options = Options(**common)
    workers = options.workers
    bad = BadRecords(options.max_bad_rows)
    with (
        prepared_folder(options.out, overwrite=options.overwrite) as folder,
        scratch_folder(folder, options.scratch) as local,
    ):
        log = open_log(local, options.seed)
        runs = EventRuns(local, log.order)
        records = _read(log, runs, workers, bad)
        log.finish_reading(bad)
        counts = {name: ValueCounts(local, name, kind=kind) for name, kind in log.counted.items()}
        parts = runs.parts(workers)

        def count(part: Part) -> Tally:
            found = log.count(pl.DataFrame(runs.read(part)))
            for name, values in found.values.items():
                counts[name].add(values)
            return found.tally

        tallies = in_order(
            parts, count, workers=workers, title="count", unit="parts", total=len(parts)
        )
        # Of each part: what came before it; and in the end, everything.
        *before, total = accumulate(tallies, initial=Tally())
        if not total.trained:
            raise DataError(
                f"{log.file.path} has too few events: none of its {total.rows} rows would be "
                "trained on. Take a larger data set."
            )
        learned = log.learn({name: found.ranked() for name, found in counts.items()}, total)
        schema = learned.schema
        folder.write_schema(schema)
        for table, values in learned.vocabularies.items():
            folder.write_vocabulary(table, values.to_arrow())
        for table, given in learned.vectors.items():
            write_vectors(folder, table, given, schema.tables[table])
        rows_per_file = shard_rows(4 * total.entries / total.rows + 8 * len(schema.columns))
        shards = Shards(scratch=local, seed=options.seed, schema=schema)
        _encode(log, runs, parts, before, total, rows_per_file, shards, workers)
        splits = shards.write_splits(folder, rows_per_file=rows_per_file, workers=workers)
        check_splits({name: split.rows for name, split in splits.items()}, None, log.file.path)
        report = Report(
            dataset=schema.dataset,
            options={**(named or {}), **lengths, "seed": options.seed},
            rows_read=records + log.records + bad.counts.total(),
            rows_kept=sum(split.rows for split in splits.values()),
            rows_bad=dict(bad.counts),
            vocabularies=dict(schema.tables),
            splits=splits,
            unknown=shards.unknown,
            notes={**learned.notes, **total.notes},
        )
        folder.write_report(report)
        return report


def _read(log: EventLog, runs: EventRuns, workers: int, bad: BadRecords) -> int:
    """Collect all events; return how many good records they are of."""
    there = log.file.columns().names
    missing = [name for name in log.columns.names if name not in there]
    if missing:
        raise DataError(
            f"{log.file.path} cannot be read (it lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(there)}). Name the right files with --raw."
        )
    good = 0
    batches = log.file.batches(log.columns)
    for read in in_order(batches, log.read, workers=workers, title="read", unit="batches"):
        for place, text in read.bad:
            bad.add(log.file.path, log.file.unit, place, text)
        good += read.good
        runs.add(read.events.to_arrow())
    logger.info("read: %s read", log.file.path)
    if not runs.rows:
        raise DataError(log.nothing)
    return good


def _encode(
    log: EventLog,
    runs: EventRuns,
    parts: Sequence[Part],
    before: Sequence[Tally],
    total: Tally,
    rows_per_file: int,
    shards: Shards,
    workers: int,
) -> None:
    """Write all rows to scratch files."""
    types = prepared_types(shards.schema)
    at_once = _rows_at_once(shards.schema)
    waiting = max(1, -(-total.trained // rows_per_file))

    def work(number: int) -> list[Noted]:
        encoded = log.encode(pl.DataFrame(runs.read(parts[number])), before[number])
        noted: list[Noted] = []
        for piece, start in enumerate(range(0, len(encoded.split_R), at_once)):
            split_M = encoded.split_R[start : start + at_once]
            stop = start + len(split_M)
            columns = pa.table(encoded.rows(start, stop))
            noted += shards.write(
                f"{number:05d}-{piece:07d}",
                columns.cast(pa.schema([types.field(name) for name in columns.column_names])),
                split_M,
                waiting_shard(
                    before[number].rows + np.arange(start, stop),
                    rows=total.rows,
                    shards=waiting,
                    seed=shards.seed,
                ),
            )
        return noted

    numbers = range(len(parts))
    for part in in_order(
        numbers, work, workers=workers, title="encode", unit="parts", total=len(parts)
    ):
        for noted in part:
            shards.note(noted)


def _rows_at_once(schema: Schema) -> int:
    """Return how many of the longest rows fit what may be made at once."""
    entries = sum(feature.max_length for feature in schema.pooled)
    entries += sum(group.max_length * len(group.fields) for group in schema.sequences)
    return max(1, ENCODED_BYTES // (4 * entries + 8 * len(schema.columns)))


def history_group(names: Sequence[str], max_length: int) -> SequenceGroup:
    """Return the usual history: columns ``history_NAME`` of tables, oldest event first."""
    fields = tuple(IdFeature(name=f"history_{name}", table=name) for name in names)
    return SequenceGroup(name="history", fields=fields, max_length=max_length)
