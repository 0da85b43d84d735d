"""Raw tables of any size become a prepared folder: one pass counts, a second encodes.

    raw files ─scan→ rows ─parse→ typed columns ─split→ counted (training rows only)
      ... again ... ─encode→ ids ─shards→ Parquet

Memory holds the vocabularies, which the model holds too, and some batches of rows; rows wait for
their order in scratch files.

Shape legend:
    N  good rows of a batch
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import polars as pl

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.counting import by_frequency, ValueCounts
from torchrec_hilomoe.data.prepare.encoding import encode, encoders_of, prepared_types
from torchrec_hilomoe.data.prepare.folder import PreparedFolder, Report, scratch_folder
from torchrec_hilomoe.data.prepare.options import Options
from torchrec_hilomoe.data.prepare.parsing import FAULT, parse
from torchrec_hilomoe.data.prepare.plan import HoldOut, Inputs, Plan
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.shards import shard_rows, Shards, SPLITS
from torchrec_hilomoe.data.prepare.sources import PLACE, RawFile, ROW
from torchrec_hilomoe.data.prepare.split_rules import (
    check_splits,
    find_rule,
    SplitRule,
    waiting_shard,
)
from torchrec_hilomoe.data.prepare.streaming import stream
from torchrec_hilomoe.data.prepare.vectors import Vectors, write_vectors
from torchrec_hilomoe.data.schema import Schema

__all__ = ["prepare_tables"]

ENTRIES = "__entries"  # of all lists of a row
SECONDS_UNTIL = 1 << 36  # the year 4147; times beyond are no seconds

logger = logging.getLogger(__name__)


def prepare_tables(
    folder: PreparedFolder,
    inputs: Inputs,
    plan: Plan,
    options: Options,
    *,
    hold_out: HoldOut,
    vectors: Mapping[str, Vectors],
    named: Mapping[str, Any],
) -> Report:
    """Count, encode, and write schema, vocabularies, splits and report.

    Args:
        folder: Where to.
        inputs: The raw files.
        plan: What to make of them.
        options: How.
        hold_out: Which training rows validate, where no file does.
        vectors: Of frozen tables; their keys are what the plan gives as vocabularies.
        named: Further options that change the result, for the report.

    Returns:
        The report.

    Raises:
        DataError: If files are missing or unreadable, lack columns, leave a split without a good
            row, or have too many bad ones.
    """
    files = (*inputs.train, *inputs.valid, *inputs.test)
    codes = (0,) * len(inputs.train) + (1,) * len(inputs.valid) + (2,) * len(inputs.test)
    types = [plan.types(file) for file in files]
    bad = BadRecords(options.max_bad_rows)
    with scratch_folder(folder, options.scratch) as scratch:
        rule = find_rule(inputs, plan, hold_out, options, scratch)
        counted = _Counted(values=_counters(plan, scratch), rows=[0] * len(files))
        for number, (file, kinds) in enumerate(zip(files, types, strict=True)):
            parsed = _parsed(counted, file.batches(kinds), plan, rule, options.workers)
            _count(counted, number, codes[number], file, parsed, plan.schema, rule, bad)
            logger.info("count: %s read", file.path)
        _check(inputs, counted, rule)
        vocabularies = _vocabularies(plan, counted)
        schema = sized(plan.schema, vocabularies)
        for table, values in vocabularies.items():
            folder.write_vocabulary(table, plan.given.get(table, values.to_arrow()))
        for table, given in vectors.items():
            write_vectors(folder, table, given, schema.tables[table])
        folder.write_schema(schema)
        shards = Shards(scratch=scratch, seed=options.seed, schema=schema)
        encoders = encoders_of(schema, vocabularies)
        every = sum(counted.rows)
        rows_per_file = shard_rows(4 * counted.entries / every + 8 * len(schema.columns))
        trained = sum(counted.rows[: len(inputs.train)])
        held = rule.hold_out.valid_percent + rule.hold_out.test_percent
        waiting = max(1, -(-(trained * (100 - held) // 100) // rows_per_file))
        begins = list(accumulate(counted.rows, initial=0))
        for number, (file, kinds) in enumerate(zip(files, types, strict=True)):
            batches = stream(
                file.batches(kinds),
                lambda rows: encode(parse(rows, plan), schema, encoders),
                workers=options.workers,
                title="encode",
            )
            for part, batch in enumerate(batches):
                at_N = begins[number] + batch[ROW].to_numpy()
                code = codes[number]
                split_N = rule.split(at_N, batch) if not code else np.full(len(at_N), code)
                noted = shards.write(
                    f"{number:05d}-{part:07d}",
                    batch.select(schema.columns).to_arrow().cast(prepared_types(schema)),
                    split_N,
                    waiting_shard(at_N, rows=trained, shards=waiting, seed=options.seed),
                )
                for what in noted:
                    shards.note(what)
            logger.info("encode: %s read", file.path)
        splits = shards.write_splits(folder, rows_per_file=rows_per_file, workers=options.workers)
    report = Report(
        dataset=schema.dataset,
        options={**named, "seed": options.seed, **rule.options},
        rows_read=counted.good.total() + bad.counts.total(),
        rows_kept=sum(split.rows for split in splits.values()),
        rows_bad=dict(bad.counts),
        vocabularies=dict(schema.tables),
        splits=splits,
        unknown=shards.unknown,
        notes=dict(rule.notes),
    )
    folder.write_report(report)
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


@dataclass(kw_only=True)
class _Counted:
    """What the first pass knows.

    Attributes:
        values: Counts of training rows' values in every column of a counted vocabulary, by table
            and column; columns of one raw column are counted once.
        rows: Of each file, bad ones included and malformed lines not.
        good: Of each split.
        entries: Of all list columns together, over all files.
    """

    values: Mapping[tuple[str, str], ValueCounts]
    rows: list[int]
    good: Counter[str] = field(default_factory=Counter)
    entries: int = 0

    def frequent(self, table: str, min_count: int) -> pl.Series:
        """Return a table's values, the most frequent first.

        A value is known if it is frequent enough in one of the table's columns; columns do not
        add up. Where it is too rare it does not count towards the order either.
        """
        found = [
            counts.at_least(min_count) for (name, _), counts in self.values.items() if name == table
        ]
        return by_frequency(pl.concat(found).group_by("value").agg(pl.col("count").sum()))


def _counters(plan: Plan, scratch: str) -> dict[tuple[str, str], ValueCounts]:
    columns: dict[tuple[str, str], str] = {}
    for feature in plan.schema.id_features:
        rule = plan.schema.vocabularies.get(feature.table)
        if rule is not None and rule.kind == "counted":
            columns.setdefault((feature.table, plan.source(feature.name)), feature.name)
    return {
        (table, name): ValueCounts(
            scratch, f"values-{place}", kind=pl.String if table in plan.text else pl.Int64
        )
        for place, ((table, _), name) in enumerate(columns.items())
    }


def _parsed(
    counted: _Counted,
    batches: Iterable[pl.DataFrame],
    plan: Plan,
    rule: SplitRule,
    workers: int,
) -> Iterator[pl.DataFrame]:
    """Yield what is counted of a file, typed, and the entries of all lists of a row."""
    schema = plan.schema
    lists = [f.name for f in schema.sequence_fields]
    lists += [f.name for f in schema.pooled if f.max_length > 1]
    lengths = [pl.col(name).list.len() for name in (*lists, *schema.event_times)]
    entries = pl.sum_horizontal(pl.lit(0, pl.Int64), *lengths).alias(ENTRIES)
    columns = {name for _, name in counted.values} | ({rule.column, schema.time} - {None})

    def query(rows: pl.LazyFrame) -> pl.LazyFrame:
        return parse(rows, plan).select(ROW, PLACE, FAULT, entries, *columns)

    return stream(batches, query, workers=workers, title="count")


def _count(
    counted: _Counted,
    number: int,
    code: int,
    file: RawFile,
    batches: Iterable[pl.DataFrame],
    schema: Schema,
    rule: SplitRule,
    bad: BadRecords,
) -> None:
    """Count a file's values, if they train, and its rows; report the bad ones."""
    first = sum(counted.rows[:number])
    late = False
    for batch in batches:
        counted.rows[number] += batch.height - batch[ROW].null_count()
        counted.entries += int(batch[ENTRIES].sum())
        good = batch.filter(pl.col(FAULT).is_null())
        if good.height < batch.height:
            faults = batch.filter(pl.col(FAULT).is_not_null()).select(PLACE, FAULT)
            for place, fault in faults.iter_rows():
                bad.add(file.path, file.unit, place, fault)
        code_N = np.full(good.height, code)
        if not code:
            code_N = rule.split(first + good[ROW].to_numpy(), good)
        counts_by_code = np.bincount(code_N, minlength=len(SPLITS)).tolist()
        counted.good.update(dict(zip(SPLITS, counts_by_code, strict=True)))
        trained = good.filter(pl.Series(code_N == 0))
        for (_, name), counts in counted.values.items():
            values = trained[name]
            counts.add(values.explode() if values.dtype.is_nested() else values)
        if schema.time is not None and (good[schema.time].to_numpy() > SECONDS_UNTIL).any():
            late = True
    if late:
        logger.warning(
            "%s: %s is beyond the year 4000 in seconds; is it in milliseconds? Divide it, or "
            "windows of time will be wrong.",
            file.path,
            schema.time,
        )


def _check(inputs: Inputs, counted: _Counted, rule: SplitRule) -> None:
    """Refuse a split without a row."""
    if not counted.good["train"] and not counted.good.total():
        raise DataError(f"{inputs.train[0].path} has no good row to train on.")
    given = {"valid": bool(inputs.valid), "test": bool(inputs.test)}
    asked = {
        "train": True,
        "valid": given["valid"] or rule.hold_out.valid_percent > 0,
        "test": given["test"] or rule.hold_out.test_percent > 0,
    }
    wanted = {split: counted.good[split] for split in SPLITS if asked[split]}
    empty = next((split for split, count in wanted.items() if not count), None)
    if empty is not None:
        own = given.get(empty, False)
        files = getattr(inputs, empty) if own else inputs.train
        check_splits(wanted, None if own else rule.hold_out, files[0].path)


def _vocabularies(plan: Plan, counted: _Counted) -> dict[str, pl.Series]:
    found: dict[str, pl.Series] = {}
    for table, rule in plan.schema.vocabularies.items():
        if rule.kind == "counted":
            found[table] = counted.frequent(table, rule.min_count)
        elif rule.kind == "given":
            found[table] = pl.Series("value", plan.given[table])
    return found
