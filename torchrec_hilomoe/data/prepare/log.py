"""A log of events becomes a prepared folder, in passes that hold a few users at a time.

    raw rows ─read→ events, sorted by user in runs ─parts of users→ counted, then encoded
      ─shards→ Parquet

Memory holds vocabularies, which the model holds too, some batches, and for each thread a part. What
is written is the same for any number of threads and parts.

Shape legend:
    R  rows of a part
    M  rows that are made at once
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Unpack

import numpy as np

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.event_log import Encoding, EventLog, Tally
from torchrec_hilomoe.data.prepare.event_runs import EventRuns, Part
from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report, scratch_folder
from torchrec_hilomoe.data.prepare.options import check_least, Common, Options
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.shards import Noted, shard_rows, Shards
from torchrec_hilomoe.data.prepare.split_rules import check_splits, waiting_shard
from torchrec_hilomoe.data.prepare.streaming import in_order
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

__all__ = ["history_group", "prepare_log"]

logger = logging.getLogger(__name__)

ENCODED_BYTES = 1 << 24  # about so much is made of a part at once


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
        counting = log.counting(local, bad)
        parts = runs.parts(workers)
        counted = in_order(
            parts,
            lambda part: counting.count(runs.read(part)),
            workers=workers,
            title="count",
            unit="parts",
            total=len(parts),
        )
        # Of each part: what came before it; and in the end, everything.
        *before, total = accumulate(counted, initial=Tally())
        if not total.trained:
            raise DataError(
                f"{log.file.path} has too few events: none of its {total.rows} rows would be "
                "trained on. Take a larger data set."
            )
        encoding = counting.encoding()
        schema = encoding.schema
        folder.write_schema(schema)
        for table, values in encoding.vocabularies.items():
            folder.write_vocabulary(table, values.to_arrow())
        rows_per_file = shard_rows(4 * total.entries / total.rows + 8 * len(schema.columns))
        shards = Shards(scratch=local, seed=options.seed, schema=schema)
        _encode(encoding, runs, parts, before, total, rows_per_file, shards, workers)
        splits = shards.write_splits(folder, rows_per_file=rows_per_file, workers=workers)
        check_splits({name: split.rows for name, split in splits.items()}, None, log.file.path)
        report = Report(
            dataset=schema.dataset,
            options={**(named or {}), **lengths, "seed": options.seed},
            rows_read=records + counting.records + bad.counts.total(),
            rows_kept=sum(split.rows for split in splits.values()),
            rows_bad=dict(bad.counts),
            vocabularies=dict(schema.tables),
            splits=splits,
            unknown=shards.unknown,
            notes={**encoding.notes, **total.notes},
        )
        folder.write_report(report)
        return report


def history_group(tables: Mapping[str, str], max_length: int) -> SequenceGroup:
    """Return the usual history: columns ``history_NAME`` of tables by name, oldest event first."""
    return SequenceGroup(
        name="history",
        fields=tuple(
            IdFeature(name=f"history_{name}", table=table) for name, table in tables.items()
        ),
        max_length=max_length,
    )


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
    encoding: Encoding,
    runs: EventRuns,
    parts: Sequence[Part],
    before: Sequence[Tally],
    total: Tally,
    rows_per_file: int,
    shards: Shards,
    workers: int,
) -> None:
    """Write all rows to scratch files."""
    at_once = _rows_at_once(encoding.schema)
    waiting = -(-total.trained // rows_per_file)

    def work(number: int) -> list[Noted]:
        encoded = encoding.encode(runs.read(parts[number]), before[number])
        noted: list[Noted] = []
        for piece, start in enumerate(range(0, len(encoded.split_R), at_once)):
            split_M = encoded.split_R[start : start + at_once]
            rows_M = np.arange(start, start + len(split_M))
            noted += shards.write_by_split(
                f"{number:05d}-{piece:07d}",
                encoded.rows(rows_M),
                split_M,
                waiting_shard(
                    before[number].rows + rows_M,
                    rows=total.rows,
                    shards=max(1, waiting),
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
