"""``check``: a prepared folder against what docs/data.md promises of one, whoever wrote it."""

from collections.abc import Iterator

from torchrec_hilomoe.data.decode import decode_block
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.frozen_vectors import open_vectors
from torchrec_hilomoe.data.layout import ColumnLayout
from torchrec_hilomoe.data.parquet import (
    check_columns,
    check_folder,
    load_schema,
    ParquetSource,
)
from torchrec_hilomoe.data.prepare.folder import REPORT_FILE
from torchrec_hilomoe.data.prepare.outcomes import Checked
from torchrec_hilomoe.data.prepare.sources import ParquetFile
from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE
from torchrec_hilomoe.data.vocabularies import read_vocabulary, vocabulary_faults
from torchrec_hilomoe.runtime.documents import parse_json, read_text
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["check_prepared"]

SPLITS = ("train", "valid", "test")
SHOWN_ROWS = 3  # of each block, in words


def check_prepared(folder: str) -> Checked:
    """Check a prepared folder: its files, schema, rows, vocabularies, vectors and report.

    Every row is read once, a block at a time.

    Args:
        folder: A folder that was prepared, by this command or by another engine.

    Returns:
        What was found.

    Raises:
        DataError: If there is no such folder.
    """
    folder = folder.rstrip("/") or "/"
    if not path_manager.isdir(folder):
        raise DataError(f"there is no folder {folder}. Name one that was prepared.")
    try:
        check_folder(folder)
        schema = load_schema(folder)
    except DataError as error:  # of what is half made nothing else can be said
        return Checked(folder=folder, rows={}, faults=(_line(error),))
    faults: list[str] = []
    rows: dict[str, int] = {}
    for split in SPLITS:
        rows[split], found = _check_split(folder, split, schema)
        faults += found
    for table in schema.vocabularies:
        faults += _vocabulary_faults(folder, schema, table)
    for table in schema.frozen:
        try:
            open_vectors(schema, table, folder)
        except DataError as error:
            faults.append(_line(error))
    faults += _report_faults(folder, rows)
    return Checked(folder=folder, rows=rows, faults=tuple(faults))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_split(folder: str, split: str, schema: Schema) -> tuple[int, list[str]]:
    """Return how many rows a split has, and its faults; rows are read if all files have columns."""
    path = f"{folder}/{split}"
    names = sorted(path_manager.ls(path)) if path_manager.isdir(path) else []
    files = [ParquetFile(f"{path}/{name}") for name in names if name.endswith(".parquet")]
    if not files:
        return 0, [f"{path} holds no .parquet file; a split without rows has one without rows."]
    faults, rows = [], 0
    for file in files:
        try:
            check_columns(file.columns(), schema, file.path)
            rows += file.rows()
        except DataError as error:
            faults.append(_line(error))
    if faults:
        return rows, faults
    if rows:
        return rows, list(_row_faults(ParquetSource(folder, split, schema)))
    return 0, [f"{path} has no rows, so that nothing can be trained."] if split == "train" else []


def _row_faults(source: ParquetSource) -> Iterator[str]:
    """Decode every block as training does."""
    layout = ColumnLayout(source.schema)
    for block in range(len(source.block_rows)):
        try:
            bad = decode_block(source.read(0, block), layout, None).bad
        except DataError as error:
            yield _line(error)
            continue
        where = source.describe(block)
        for description in list(bad.values())[:SHOWN_ROWS]:
            yield f"{where}: {description}"
        if len(bad) > SHOWN_ROWS:
            yield f"{where}: {len(bad) - SHOWN_ROWS} more bad rows"


def _vocabulary_faults(folder: str, schema: Schema, table: str) -> Iterator[str]:
    rule = schema.vocabularies[table]
    if rule.kind == "hashed":
        return
    if rule.file is None:
        yield f"{folder}/{SCHEMA_FILE}: the vocabulary of table {table!r} names no file"
        return
    path = f"{folder}/{rule.file}"
    try:
        found = read_vocabulary(path)
    except DataError as error:
        yield str(error)
        return
    yield from (f"{path}: {fault}" for fault in vocabulary_faults(found, schema, table))


def _report_faults(folder: str, rows: dict[str, int]) -> Iterator[str]:
    path = f"{folder}/{REPORT_FILE}"
    if not path_manager.isfile(path):
        return  # another engine need not write one
    try:
        splits = parse_json(read_text(path), path).get("splits", {})
        said = {split: int(splits[split]["rows"]) for split in SPLITS if split in splits}
    except (ValueError, TypeError, KeyError, OSError) as error:
        yield f"{path}: is no report ({_line(error)})"
        return
    for split, count in said.items():
        if count != rows[split]:
            yield f"{path}: says {count} rows of {split}, its files have {rows[split]}"
