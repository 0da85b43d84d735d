"""``schema init``: a commented schema to start from, guessed from the first rows of a table."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.guesses import Guess, guess, Guesses
from torchrec_hilomoe.data.prepare.options import check_least
from torchrec_hilomoe.data.prepare.outcomes import Draft
from torchrec_hilomoe.data.prepare.own_tables import Description
from torchrec_hilomoe.data.prepare.seen_columns import read_columns, SeenColumn
from torchrec_hilomoe.runtime.paths import path_manager, write_text

__all__ = ["draft_schema"]

MANY = 1000  # values of which rare ones are better unknown
BUCKETS = 32  # of numbers along a history
LONGEST = 200  # events of a history, unless somebody says otherwise
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # of YAML
COMMENT_AT = 40


def draft_schema(files: Sequence[str], *, out: str, rows: int = 100_000) -> Draft:
    """Write a commented schema for your own table, to correct and then to prepare with.

    Args:
        files: Parquet, or CSV with a header; several are parts of one table.
        out: YAML file to write; one that is there already is kept.
        rows: How many rows to look at, from the first on.

    Returns:
        What was written.

    Raises:
        DataError: If a file cannot be read, or ``out`` is there already.
        ValueError: If an option is out of range.
    """
    check_least(1, rows=rows)
    if path_manager.exists(out):
        raise DataError(f"--out {out} is there already; remove it, or name another file.")
    columns = read_columns(files, rows)
    found = guess(columns)
    if not found.candidate:
        raise DataError(
            f"no column of {files[0]} is one of ids, texts or whole numbers, of which the "
            "candidate must be one. Add the id of what may be clicked."
        )
    dataset = os.path.basename(out).partition(".")[0]
    text = "\n".join(_lines(found, columns, files, out, dataset)) + "\n"
    write_text(out, text)
    Description.read(out)  # what prepare will do with it
    return Draft(path=out, text=text, hint=_hint(found, files, out, rows))


def _lines(
    found: Guesses, columns: Sequence[SeenColumn], files: Sequence[str], out: str, dataset: str
) -> Iterator[str]:
    rows = len(columns[0].values)
    yield f"# Guessed from {rows:,} rows of {', '.join(files)}: read each line, and correct it."
    yield "# docs/data.md explains the fields."
    yield f"dataset: {_name(dataset)}"
    if found.label is None:
        yield _commented("label: label", f"NOT FOUND: {_no_label(columns)}")
    else:
        yield _commented(f"label: {_name(found.label.column.name)}", found.label.why)
    item = found.candidate[0].column.name
    if found.group is None:
        yield _commented(f"group: {_name(item)}", "GAUC averages over it; better a user's id")
    else:
        why = f"GAUC averages over it; {found.group.why}"
        yield _commented(f"group: {_name(found.group.column.name)}", why)
    if found.time is not None:
        why = f"{found.time.why}; the latest rows are held out"
        yield _commented(f"time: {_name(found.time.column.name)}", why)
    yield "candidate:"
    yield from map(_feature, found.candidate)
    if found.history:
        yield from _history(found)
    if found.pooled:
        yield "pooled:"
        yield from map(_feature, found.pooled)
    if found.dense:
        yield "dense:"
        yield from (_commented(f"- {_name(g.column.name)}", g.why) for g in found.dense)
    yield from _vocabularies(found)
    if found.left_out:
        yield "# Left out:"
        yield from (f"# - {_name(g.column.name)}: {g.why}" for g in found.left_out)


def _history(found: Guesses) -> Iterator[str]:
    first = found.history[0].column
    yield "sequences:"
    yield f"- name: {_name(first.name)}"
    kept = f"longest seen: {first.longest}; the oldest event must be first"
    yield _commented(f"  max_length: {max(1, min(first.longest, LONGEST))}", kept)
    if found.history_time is not None:
        yield f"  time: {_name(found.history_time.column.name)}"
    yield "  fields:"
    yield from (f"  {_feature(field, many=False)}" for field in found.history)


def _feature(one: Guess, *, many: bool = True) -> str:
    column, more = one.column, ""
    if many and column.is_list:
        more = f", max_length: {max(2, min(column.longest, LONGEST))}"
    return _commented(f"- {{name: {_name(column.name)}, table: {_name(one.table)}{more}}}", one.why)


def _vocabularies(found: Guesses) -> Iterator[str]:
    ids = [*found.candidate, *found.history, *found.pooled]
    columns = {one.table: one.column for one in reversed(ids)}
    hashed = [t for t, column in columns.items() if column.kind == "fingerprint"]
    bucketed = {one.table for one in ids if one.bucketed}
    if hashed:
        yield _commented("tables:", "rows that fingerprints of 64 bits share")
        yield from (f"  {_name(table)}: 1000000" for table in hashed)
    yield "vocabularies:"
    for table in dict.fromkeys(one.table for one in ids):
        if table in hashed:
            yield f"  {_name(table)}: {{kind: hashed}}"
        elif table in bucketed:
            line = f"  {_name(table)}: {{kind: bucketed, buckets: {BUCKETS}}}"
            yield _commented(line, "quantiles of training rows")
        elif len(columns[table].distinct) > MANY:
            line = f"  {_name(table)}: {{kind: counted, min_count: 2}}"
            yield _commented(line, "rarer values are unknown")
        else:
            yield f"  {_name(table)}: {{kind: counted}}"


def _no_label(columns: Sequence[SeenColumn]) -> str:
    clicks = [column.name for column in columns if column.is_click()]
    if clicks:
        return f"{', '.join(clicks)} hold 0 and 1; name the one that is a click"
    return "no column holds 0 and 1; make one, such as of ratings by a threshold"


def _hint(found: Guesses, files: Sequence[str], out: str, rows: int) -> str:
    folder, name = os.path.split(files[0])
    raw, steps = "RAW", []
    if name == "train.parquet" and len(files) == 1:
        raw = folder or "."
    elif all(path.endswith(".parquet") for path in files):
        steps.append(f"mkdir -p RAW/train && cp {' '.join(map(shlex.quote, files))} RAW/train")
    else:
        read = f"scan_csv({list(files)}, try_parse_dates=True, infer_schema_length={rows})"
        sink = "sink_parquet('RAW/train.parquet', mkdir=True)"
        steps.append(f'python -c "import polars as pl; pl.{read}.{sink}"')
    lists = [*found.history, *found.pooled, *filter(None, [found.history_time])]
    separators = {g.column.separator for g in lists} - {""}  # one, as others are left out
    options = "".join(f" --separator '{separator}'" for separator in separators)
    options += " --fill_dense 0" if any(g.column.missing for g in found.dense) else ""
    steps.append(
        f"python -m torchrec_hilomoe prepare parquet --raw {shlex.quote(raw)} "
        f"--schema {shlex.quote(out)} --out DIR{options}"
    )
    recipe = "" if found.history else "--config dlrm-parquet "
    steps.append(f"python -m torchrec_hilomoe train {recipe}--data.path DIR --out_dir RUN")
    return "\n".join([f"wrote {out}. Read it, correct it, then:", *(f"  {s}" for s in steps)])


def _commented(line: str, why: str) -> str:
    return f"{line:<{COMMENT_AT - 1}} # {why}"


def _name(text: str) -> str:
    """As YAML reads it: plain where it can be taken for nothing else."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    """As it is, unless YAML refuses it; YAML joins no surrogates, which JSON escapes by."""
    escapes = not character.isprintable() and character <= "\uffff"
    return json.dumps(character, ensure_ascii=escapes)[1:-1]
