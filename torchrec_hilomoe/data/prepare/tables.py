"""Raw tables of any size become a prepared folder: they are read once, counted, and encoded.

    raw files ─scan→ rows ─parse→ typed columns ─pieces→ split, counted (training rows only)
      ─pieces→ encoded ─shards→ Parquet

Memory holds the vocabularies, which the model holds too, and some batches of rows. Good rows wait
in pieces, compressed files of a batch each, for what only all rows tell: where splits begin, and
which values are frequent. A piece is removed when it is encoded.

Shape legend:
    N  good rows of a piece
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import numpy as np
import polars as pl

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, HoldOut, Inputs
from torchrec_hilomoe.data.prepare.counting import by_frequency, ValueCounts
from torchrec_hilomoe.data.prepare.encoding import (
    encode,
    encoders_of,
    list_limits,
    prepared_types,
)
from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report, scratch_folder
from torchrec_hilomoe.data.prepare.options import Common, Options
from torchrec_hilomoe.data.prepare.order_statistics import Buckets, OrderStatistics
from torchrec_hilomoe.data.prepare.parsing import FAULT, parse
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.shards import Noted, shard_rows, Shards, SPLITS
from torchrec_hilomoe.data.prepare.sources import PLACE, ROW
from torchrec_hilomoe.data.prepare.split_rules import (
    check_splits,
    find_rule,
    SplitRule,
    waiting_shard,
)
from torchrec_hilomoe.data.prepare.streaming import in_order
from torchrec_hilomoe.data.prepare.vectors import Vectors, write_vectors
from torchrec_hilomoe.data.schema import Schema

__all__ = ["prepare_tables"]

ENTRIES = "__entries"  # of all lists of a row
AT = "__at"  # the place of a row among the rows of all files
SECONDS_UNTIL = 1 << 36  # the year 4147; times beyond are no seconds

# Counts of the values of every column of a counted vocabulary, by table and column, or the numbers
# of one whose values are buckets; columns of one raw column are counted once.
_Counts = Mapping[tuple[str, str], ValueCounts | Buckets]

logger = logging.getLogger(__name__)


def prepare_tables(
    inputs: Inputs,
    mapping: ColumnMapping,
    *,
    hold_out: HoldOut,
    vectors: Mapping[str, Vectors] | None = None,
    named: Mapping[str, Any] | None = None,
    **common: Unpack[Common],
) -> Report:
    """Count, encode, and write schema, vocabularies, splits and report.

    Args:
        inputs: The raw files.
        mapping: What to make of them.
        hold_out: Which training rows validate, where no file does.
        vectors: Of frozen tables; their keys are what the mapping gives as vocabularies.
        named: Further options that change the result, for the report.
        common: Options that every command has.

    Returns:
        The report.

    Raises:
        DataError: If files are missing or unreadable, lack columns, leave a split without a good
            row, or have too many bad ones.
    """
    options = Options(**common)
    workers = options.workers
    bad = BadRecords(options.max_bad_rows)
    hold_out = replace(
        hold_out,
        valid_percent=0 if inputs.valid else hold_out.valid_percent,
        test_percent=0 if inputs.test else hold_out.test_percent,
    )
    with (
        prepared_folder(options.out, overwrite=options.overwrite) as folder,
        scratch_folder(folder, options.scratch) as scratch,
    ):
        times = OrderStatistics(scratch, "times")
        pieces = _read(inputs, mapping, scratch, workers, bad, times)
        trained = sum(piece.rows for piece in pieces if not piece.code)
        rule = find_rule(hold_out, mapping.schema, options.seed, rows=trained, times=times)
        counts = _counters(mapping, scratch)
        kept = {} if mapping.counts_cut_entries else _kept_entries(mapping)
        good: Counter[str] = Counter()
        go = partial(in_order, pieces, workers=workers, unit="pieces", total=len(pieces))
        for found in go(lambda piece: _count(piece, rule, counts, kept), title="count"):
            good.update(found)
        _check(inputs, good, rule)
        vocabularies = _vocabularies(mapping, counts)
        schema = sized(mapping.schema, vocabularies)
        for table, values in vocabularies.items():
            folder.write_vocabulary(table, mapping.given.get(table, values.to_arrow()))
        for table, given in (vectors or {}).items():
            write_vectors(folder, table, given, schema.tables[table])
        folder.write_schema(schema)
        entries, every = (sum(getattr(piece, it) for piece in pieces) for it in ("entries", "rows"))
        rows_per_file = shard_rows(4 * entries / every + 8 * len(schema.columns))
        held = hold_out.valid_percent + hold_out.test_percent
        train_shards = max(1, -(-(trained * (100 - held) // 100) // rows_per_file))
        shards = Shards(scratch=scratch, seed=options.seed, schema=schema)
        encoders = encoders_of(schema, vocabularies)

        def write(piece: _Piece) -> list[Noted]:
            rows = piece.load()
            os.remove(piece.path)
            return shards.write(
                os.path.basename(piece.path),
                encode(rows, schema, encoders).to_arrow().cast(prepared_types(schema)),
                piece.split(rule, rows),
                waiting_shard(
                    rows[AT].to_numpy(), rows=trained, shards=train_shards, seed=options.seed
                ),
            )

        for noted in go(write, title="encode"):
            for what in noted:
                shards.note(what)
        splits = shards.write_splits(folder, rows_per_file=rows_per_file, workers=workers)
        report = Report(
            dataset=schema.dataset,
            options={**(named or {}), "seed": options.seed, **rule.options},
            rows_read=good.total() + bad.counts.total(),
            rows_kept=sum(split.rows for split in splits.values()),
            rows_bad=dict(bad.counts),
            vocabularies=dict(schema.tables),
            splits=splits,
            unknown=shards.unknown,
            notes=dict(rule.notes),
        )
        folder.write_report(report)
        for name, split in splits.items():
            if not split.rows:
                logger.warning(
                    "%s has no %s rows, which a run needs: to train on it, prepare again with "
                    "--%s_percent above 0 or with files of that split.",
                    options.out,
                    name,
                    name,
                )
        return report


def sized(schema: Schema, vocabularies: Mapping[str, pl.Series]) -> Schema:
    """Return a schema whose counted and given tables have the rows that their values need.

    Beside the values these are padding and, if it has a row of its own, "unknown".
    """
    rows = {
        table: len(values) + 1 + (schema.vocabularies[table].unknown == "last")
        for table, values in vocabularies.items()
    }
    return replace(schema, tables={**schema.tables, **rows})


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A batch of a raw file, whose good rows wait in a scratch file.

    Attributes:
        path: Of the scratch file: the schema's columns, typed but not encoded, and ``AT``.
        code: The split whose file it is from, an index into ``SPLITS``.
        rows: How many there are, bad ones included and malformed lines not.
        entries: Of all their lists.
        bad: Where bad ones are, and what is wrong.
        times: Of good ones, until they are collected; null without times.
    """

    path: str
    code: int
    rows: int
    entries: int
    bad: list[tuple[int, str]]
    times: np.ndarray | None

    def load(self) -> pl.DataFrame:
        """Return the good rows, from whichever thread."""
        return pl.read_ipc(self.path)

    def split(self, rule: SplitRule, rows: pl.DataFrame) -> np.ndarray:
        """Return the split of each good row, an index into ``SPLITS``: ``(N,)``."""
        return (
            np.full(rows.height, self.code) if self.code else rule.split(rows[AT].to_numpy(), rows)
        )


def _read(
    inputs: Inputs,
    mapping: ColumnMapping,
    scratch: str,
    workers: int,
    bad: BadRecords,
    times: OrderStatistics,
) -> list[_Piece]:
    """Read all files; bad rows are told, and the times of training files' good ones collected."""
    schema = mapping.schema
    lists = [f.name for f in schema.sequence_fields]
    lists += [f.name for f in schema.pooled if f.max_length > 1]
    lengths = [pl.col(name).list.len() for name in (*lists, *schema.event_times)]
    entries = pl.sum_horizontal(pl.lit(0, pl.Int64), *lengths)
    by_split = enumerate((inputs.train, inputs.valid, inputs.test))
    files = [(code, file) for code, found in by_split for file in found]
    types = [mapping.types(file) for _, file in files]
    pieces: list[_Piece] = []
    for (code, file), kinds in zip(files, types, strict=True):
        begin = sum(piece.rows for piece in pieces)
        number = len(pieces)

        def work(
            numbered: tuple[int, pl.DataFrame], code: int = code, begin: int = begin
        ) -> _Piece:
            number, batch = numbered
            rows = parse(batch.lazy(), mapping).with_columns(entries.alias(ENTRIES)).collect()
            fine = pl.col(FAULT).is_null()
            good = rows.filter(fine).select(*schema.columns, (begin + pl.col(ROW)).alias(AT))
            path = os.path.join(scratch, f"{number:08d}.piece")
            good.write_ipc(path, compression="lz4")
            return _Piece(
                path=path,
                code=code,
                rows=rows.height - rows[ROW].null_count(),
                entries=int(rows[ENTRIES].sum()),
                bad=rows.filter(~fine).select(PLACE, FAULT).rows(),
                times=None if schema.time is None else good[schema.time].to_numpy(),
            )

        batches = enumerate(file.batches(kinds), start=number)
        late = False
        for piece in in_order(batches, work, workers=workers, title="read", unit="batches"):
            for place, fault in piece.bad:
                bad.add(file.path, file.unit, place, fault)
            pieces.append(replace(piece, times=None))
            if piece.times is not None:
                late |= bool((piece.times > SECONDS_UNTIL).any())
                if not code:
                    times.add(piece.times)
        if late:
            logger.warning(
                "%s: %s is beyond the year 4000 in seconds; is it in milliseconds? Divide it, or "
                "windows of time will be wrong.",
                file.path,
                schema.time,
            )
        logger.info("read: %s read", file.path)
    return pieces


def _count(
    piece: _Piece, rule: SplitRule, counts: _Counts, kept: Mapping[str, pl.Expr]
) -> Counter[str]:
    """Count a piece's values, if they train, and its rows of each split."""
    rows = piece.load()
    split_N = piece.split(rule, rows)
    trained = rows.filter(pl.Series(split_N == 0))
    for (_, name), found in counts.items():
        values = trained.select(kept.get(name, pl.col(name))).to_series()
        values = values.explode() if values.dtype.is_nested() else values
        if isinstance(found, Buckets):
            found.add(values.drop_nulls().to_numpy())
        else:
            found.add(values)
    by_split = np.bincount(split_N, minlength=len(SPLITS)).tolist()
    return Counter(dict(zip(SPLITS, by_split, strict=True)))


def _kept_entries(mapping: ColumnMapping) -> dict[str, pl.Expr]:
    """Return what ``max_length`` leaves of each list, or of any other of its raw column and table.

    Entries that are cut off everywhere would make rows of a table that are never trained.
    """
    limits = list_limits(mapping.schema)
    lists = [f for f in mapping.schema.id_features if limits[f.name][0] is not None]
    ends: dict[tuple[str, str], dict[str, int]] = {}
    for feature in lists:
        limit, keep = limits[feature.name]
        most = ends.setdefault((feature.table, mapping.source(feature.name)), {})
        most[keep] = max(most.get(keep, 0), limit or 0)
    kept: dict[str, pl.Expr] = {}
    for feature in lists:
        entries = pl.col(feature.name).list
        most = ends[feature.table, mapping.source(feature.name)]
        first = most.get("first", 0)
        rest = entries.slice(first).list.tail(most.get("last", 0))  # each entry once
        kept[feature.name] = pl.concat_list(entries.head(first), rest)
    return kept


def _counters(mapping: ColumnMapping, scratch: str) -> _Counts:
    columns: dict[tuple[str, str], str] = {}
    for feature in mapping.schema.id_features:
        rule = mapping.schema.vocabularies.get(feature.table)
        if rule is not None and rule.kind in ("counted", "bucketed"):
            columns.setdefault((feature.table, mapping.source(feature.name)), feature.name)
    buckets = {
        table: Buckets(scratch, f"numbers-{at}") for at, table in enumerate(mapping.schema.tables)
    }
    return {
        (table, name): (
            buckets[table]
            if mapping.value(table) == pl.Float64
            else ValueCounts(scratch, f"values-{place}", kind=mapping.value(table))
        )
        for place, ((table, _), name) in enumerate(columns.items())
    }


def _check(inputs: Inputs, good: Mapping[str, int], rule: SplitRule) -> None:
    """Refuse a split without a row."""
    if not sum(good.values()):
        raise DataError(f"{inputs.train[0].path} has no good row to train on.")
    given = {"valid": bool(inputs.valid), "test": bool(inputs.test)}
    asked = {
        "train": True,
        "valid": given["valid"] or rule.hold_out.valid_percent > 0,
        "test": given["test"] or rule.hold_out.test_percent > 0,
    }
    wanted = {split: good[split] for split in SPLITS if asked[split]}
    empty = next((split for split, count in wanted.items() if not count), None)
    if empty is not None:
        own = given.get(empty, False)
        files = getattr(inputs, empty) if own else inputs.train
        check_splits(wanted, None if own else rule.hold_out, files[0].path)


def _vocabularies(mapping: ColumnMapping, counts: _Counts) -> dict[str, pl.Series]:
    """Return the values of counted, bucketed and given tables.

    A value is known if it is frequent enough in one of the table's columns; columns do not add up.
    Where it is too rare it does not count towards the order either.
    """
    found: dict[str, pl.Series] = {}
    for table, rule in mapping.schema.vocabularies.items():
        own = [it for (of, _), it in counts.items() if of == table]
        if rule.buckets is not None:
            (numbers,) = {it for it in own if isinstance(it, Buckets)}  # of all columns
            found[table] = pl.Series("value", numbers.least(rule.buckets))
        elif rule.kind == "counted":
            columns = [it.at_least(rule.min_count) for it in own if isinstance(it, ValueCounts)]
            whole = pl.concat(columns).group_by("value").agg(pl.col("count").sum())
            found[table] = by_frequency(whole)
        elif rule.kind == "given":
            found[table] = pl.Series("value", mapping.given[table])
    return found
