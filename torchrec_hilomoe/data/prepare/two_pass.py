"""Raw tables of any size become a prepared folder: one pass counts, a second encodes.

Memory holds the vocabularies, which the model holds too, and a few pieces of the raw tables; rows
wait for their order in scratch files.

Shape legend:
    N  rows of a piece
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.encoders import Encoder
from torchrec_hilomoe.data.prepare.encoding import count_unknown, encode_rows, encoders_of
from torchrec_hilomoe.data.prepare.first_pass import count, Counted
from torchrec_hilomoe.data.prepare.folder import PreparedFolder, Report
from torchrec_hilomoe.data.prepare.options import Options
from torchrec_hilomoe.data.prepare.parsing import parse
from torchrec_hilomoe.data.prepare.pieces import each_piece
from torchrec_hilomoe.data.prepare.plan import HoldOut, Inputs, Plan
from torchrec_hilomoe.data.prepare.raw import Piece
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.scratch import scratch_folder
from torchrec_hilomoe.data.prepare.shards import Noted, Shards
from torchrec_hilomoe.data.prepare.split_rules import Rule
from torchrec_hilomoe.data.prepare.vectors import Vectors, write_vectors
from torchrec_hilomoe.data.schema import Schema

__all__ = ["prepare_tables"]


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
        DataError: If files are missing or unreadable, lack columns, have no good row, or have
            too many bad ones.
    """
    files = (*inputs.train, *inputs.valid, *inputs.test)
    for file in files:
        plan.check(file)
    bad = BadRecords(options.max_bad_rows)
    with scratch_folder(folder, options.scratch) as scratch:
        counted = count(
            files, len(inputs.train), plan, scratch=scratch, workers=options.workers, bad=bad
        )
        if not sum(counted.good_rows.get(file.path, 0) for file in inputs.train):
            raise DataError(f"{inputs.train[0].path} has no good row to train on.")
        vocabularies = _vocabularies(plan, counted)
        schema = sized(plan.schema, vocabularies)
        for table, values in vocabularies.items():
            folder.write_vocabulary(table, values)
        for table, given in vectors.items():
            write_vectors(folder, table, given, schema.tables[table])
        folder.write_schema(schema)
        encoders = encoders_of(schema, vocabularies)
        rule = Rule.of(inputs, counted, schema, hold_out, options.seed)
        shards = Shards(scratch=scratch, seed=options.seed)
        unknown = _encode(inputs, plan, schema, encoders, rule, shards, options.workers)
        columns = _columns(plan, schema, encoders)
        splits = shards.write_splits(
            folder,
            columns=columns,
            rows_per_file=rule.rows_per_file,
            workers=options.workers,
        )
    report = Report(
        dataset=schema.dataset,
        options={**named, "seed": options.seed, **rule.options},
        rows_read=sum(counted.good_rows.values()) + bad.counts.total(),
        rows_kept=sum(split.rows for split in splits.values()),
        rows_bad=dict(bad.counts),
        vocabularies=dict(schema.tables),
        splits=splits,
        notes={**rule.notes, **unknown},
    )
    folder.write_report(report)
    return report


def sized(schema: Schema, vocabularies: Mapping[str, pa.Array]) -> Schema:
    """Return a schema whose counted and given tables have the rows that their values need.

    Beside the values these are padding and, if it has a row of its own, "unknown".
    """
    rows = {
        table: len(values) + 1 + (schema.vocabularies[table].unknown == "last")
        for table, values in vocabularies.items()
    }
    return replace(schema, tables={**schema.tables, **rows})


def _vocabularies(plan: Plan, counted: Counted) -> dict[str, pa.Array]:
    found = {}
    for table, rule in plan.schema.vocabularies.items():
        if rule.kind == "counted":
            found[table] = counted.frequent(table, rule.min_count)
        elif rule.kind == "given":
            found[table] = plan.given[table]
    return found


def _encode(
    inputs: Inputs,
    plan: Plan,
    schema: Schema,
    encoders: Mapping[str, Encoder],
    rule: Rule,
    shards: Shards,
    workers: int,
) -> dict[str, int]:
    """Write all rows to scratch files; return how many ids are unknown, for the report."""

    def work(file: int, piece: Piece) -> list[Noted]:
        parsed = parse(piece.load(), plan)
        rows = encode_rows(parsed, schema, encoders)
        return shards.write_by_split(
            f"{file:05d}-{piece.number:07d}",
            rows,
            rule.split(file, piece.first, parsed, schema),
            rule.shard(file, piece.first, parsed),
            label=schema.label,
            unknown=lambda part: count_unknown(part, schema),
        )

    unknown: Counter[str] = Counter()
    files = (*inputs.train, *inputs.valid, *inputs.test)
    for _, parts in each_piece(files, plan.wanted, work, workers=workers, title="encode"):
        for noted in parts:
            shards.note(noted)
            for table, ids in noted.unknown.items():
                unknown[f"unknown_{table}_{noted.split}"] += ids
    return {name: ids for name, ids in sorted(unknown.items()) if ids}


def _columns(plan: Plan, schema: Schema, encoders: Mapping[str, Encoder]) -> pa.Schema:
    """Return the types of the columns, which a split without a row needs too."""
    nothing = pa.table({name: pa.array([], pa.string()) for name in plan.sources})
    return encode_rows(parse(nothing, replace(plan, reshape=None)), schema, encoders).schema
