"""A prepared folder is written beside its place and renamed once it is whole.

Layout: ``schema.json``, ``report.json``, ``{train,valid,test}/part-NNNNN.parquet`` and
``_SUCCESS``, which is written last.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import SUCCESS_FILE
from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE
from torchrec_hilomoe.runtime.paths import open_binary, open_text, path_manager, remove_tree, rename

__all__ = [
    "ROW_GROUP_ROWS",
    "PreparedFolder",
    "Report",
    "Split",
    "prepared_folder",
    "scratch_folder",
    "vectors_file",
    "vocabulary_file",
]

REPORT_FILE = "report.json"
ROW_GROUP_ROWS = 8192
ROWS_PER_FILE = 32 * ROW_GROUP_ROWS
# Beside a folder, for as long as it takes to make it: what is written, and what it replaces. They
# are names that nobody else gives, because what a killed process leaves is removed by name.
PARTIAL, OLD = "prepare-partial", "prepare-old"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What was written of a split.

    Attributes:
        rows: How many.
        label_rate: Share of clicks; ``None`` without a row.
    """

    rows: int
    label_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What preparing came to: ``report.json``, and what the command prints.

    Attributes:
        dataset: Its name.
        options: Those that change the result.
        rows_read: Raw records of all files, bad ones included.
        rows_kept: Rows written, over all splits.
        rows_bad: Malformed raw lines, by file.
        vocabularies: Rows of each embedding table, id 0 included.
        splits: By name.
        notes: Counts that are particular to the data set.
        unknown: Ids that stand for values which no training row has often enough: by split and
            table, ``unknown_ids`` of ``ids``, and ``rows_with_unknown`` of ``rows``.
    """

    dataset: str
    options: dict[str, Any]
    rows_read: int
    rows_kept: int
    rows_bad: dict[str, int]
    vocabularies: dict[str, int]
    splits: dict[str, Split]
    notes: dict[str, int]
    unknown: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of ``report.json``."""
        return json.dumps(asdict(self), indent=2)


def vocabulary_file(table: str) -> str:
    """Return where a table's raw values and their ids are, beside the schema."""
    return f"vocabularies/{table}.parquet"


def vectors_file(table: str) -> str:
    """Return where a frozen table's vectors are, beside the schema."""
    return f"vectors/{table}.npy"


class PreparedFolder:
    """Writes into a folder that is not yet in its place; :func:`prepared_folder` makes one.

    Args:
        path: Where it is for now.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def path(self) -> str:
        """Where it is for now."""
        return self._path

    def write_schema(self, schema: Schema) -> None:
        """Write what the columns mean."""
        schema.save(f"{self._path}/{SCHEMA_FILE}")

    def write_report(self, report: Report) -> None:
        """Write what came of it."""
        with open_text(f"{self._path}/{REPORT_FILE}", "w") as sink:
            sink.write(report.to_json() + "\n")

    def write_part(
        self, split: str, number: int, columns: pa.Schema, tables: Iterable[pa.Table]
    ) -> None:
        """Write one file of a split, in whichever thread.

        Args:
            split: Its name.
            number: Of the file.
            columns: Names and types.
            tables: Its rows; each table becomes one row group or more.
        """
        folder = f"{self._path}/{split}"
        path_manager.mkdirs(folder)
        # Checksums turn a flipped bit into an error where the file is read.
        with (
            open_binary(f"{folder}/part-{number:05d}.parquet", "wb") as sink,
            pq.ParquetWriter(sink, columns, write_page_checksum=True) as writer,
        ):
            for table in tables:
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)

    def write_vocabulary(self, table: str, values: pa.Array) -> None:
        """Write the raw values of a table, the one with id 1 first."""
        path = f"{self._path}/{vocabulary_file(table)}"
        path_manager.mkdirs(path.rpartition("/")[0])
        ids = pa.array(range(1, len(values) + 1), pa.int64())
        with open_binary(path, "wb") as sink:
            pq.write_table(pa.table({"value": values, "id": ids}), sink)

    def write_split(
        self, name: str, rows: int, make: Callable[[int, int], pa.Table], *, label: str = "label"
    ) -> Split:
        """Write a split, a row group at a time, so that memory does not grow with the rows.

        Args:
            name: Of the split.
            rows: How many; a split without rows gets an empty file.
            make: Called with ``start`` and ``stop``, returns those rows.
            label: The column of clicks.

        Returns:
            What was written.
        """
        clicks = 0

        def tables(first: int) -> Iterator[pa.Table]:
            nonlocal clicks
            for start in range(first, min(first + ROWS_PER_FILE, rows), ROW_GROUP_ROWS):
                table = make(start, min(start + ROW_GROUP_ROWS, rows))
                clicks += int(table.column(label).to_numpy().sum())
                bar.update(table.num_rows)
                yield table

        # Off a terminal there is no bar; the line below is all.
        with tqdm(total=rows, desc=name, unit=" rows", unit_scale=True, disable=None) as bar:
            for part, first in enumerate(range(0, max(rows, 1), ROWS_PER_FILE)):
                self.write_part(name, part, make(0, 0).schema, tables(first))
        logger.info("%s: %d rows written", name, rows)
        return Split(rows=rows, label_rate=clicks / rows if rows else None)


@contextmanager
def prepared_folder(out: str, *, overwrite: bool) -> Iterator[PreparedFolder]:
    """Give a folder to write in; on leaving without an error it appears as ``out``, whole.

    A process that is killed leaves ``out`` as it was, and a folder ``out.prepare-partial-PID``
    that nothing takes for data and that the next one removes; an error leaves not even that. One
    that is killed while it replaces ``out`` may leave it as ``out.prepare-old-PID``; the next one
    renames that back first.

    Args:
        out: Its place; of a link, the folder that it points to.
        overwrite: Whether a prepared folder that is there already may be replaced.

    Yields:
        The writer.

    Raises:
        DataError: If ``out`` holds anything, unless it is a prepared folder and ``overwrite``, or
            if another process is writing it.
    """
    out = out.rstrip("/")
    if out and "://" not in out:
        out = os.path.realpath(out)  # renamed itself, a link would leave its folder where it is
    _check_place(out, overwrite)
    partial = f"{out}.{PARTIAL}-{os.getpid()}"
    path_manager.mkdirs(os.path.dirname(out))
    with _claimed(out, partial, overwrite):
        try:
            yield PreparedFolder(partial)
            with open_text(f"{partial}/{SUCCESS_FILE}", "w"):
                pass
            _replace(partial, out, overwrite)
        finally:
            if path_manager.isdir(partial):
                remove_tree(partial)


@contextmanager
def _claimed(out: str, partial: str, overwrite: bool) -> Iterator[None]:
    """Make ``partial`` this process's own, after removing what killed ones left.

    A local folder is locked while its process lives; the system ends the lock with the process. A
    remote store has no such locks, and there nobody is refused and nothing removed.
    """
    parent = os.path.dirname(out)
    if not os.path.isdir(parent):
        path_manager.mkdirs(partial)
        yield
        return
    with _locked(parent):  # for as long as it takes to look: nobody else looks meanwhile
        for left in _left(out, PARTIAL):
            _remove_left(out, left)
        _take_back(out)
        # The data that came back, or that another process has made meanwhile, are data, too.
        _check_place(out, overwrite)
        os.mkdir(partial)
        mine = os.open(partial, os.O_RDONLY)
        fcntl.flock(mine, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(mine)


def _left(out: str, kind: str) -> list[str]:
    """Return the folders beside ``out`` that have a name which only this module gives."""
    parent, name = os.path.split(out)
    ours = re.compile(rf"{re.escape(name)}\.{kind}-[0-9]+")
    names = sorted(name for name in os.listdir(parent) if ours.fullmatch(name))
    paths = [os.path.join(parent, name) for name in names]
    return [path for path in paths if os.path.isdir(path) and not os.path.islink(path)]


def _take_back(out: str) -> None:
    """Rename the old data to ``out``, if a process was killed before the new ones came there."""
    for old in _left(out, OLD):
        if not any(os.path.isfile(f"{old}/{name}") for name in (SCHEMA_FILE, SUCCESS_FILE)):
            continue  # no data of ours
        if os.path.isdir(out) and os.listdir(out):
            logger.info("removed %s, the data that %s had replaced", old, out)
            _discard(old, f"{out}.{PARTIAL}-{os.getpid()}")
            continue
        logger.warning("%s are the data of %s: renamed back", old, out)
        if os.path.isdir(out):
            os.rmdir(out)
        rename(old, out)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_left(out: str, partial: str) -> None:
    """Remove a folder of a process that is gone.

    Raises:
        DataError: If it is not gone.
    """
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        logger.info("removed %s, which a process that was killed had left", partial)
        remove_tree(partial)
    except BlockingIOError as error:
        raise DataError(
            f"--out {out} is being prepared by process {partial.rpartition('-')[2]} at this "
            "moment; wait for it, or name another folder."
        ) from error
    finally:
        os.close(handle)


def _check_place(out: str, overwrite: bool) -> None:
    if not out:
        raise DataError("--out is empty; name a new folder.")
    if path_manager.isfile(out):
        raise DataError(f"--out {out} is a file; name a new folder.")
    if not path_manager.isdir(out) or not path_manager.ls(out):
        return
    if not path_manager.isfile(f"{out}/{SCHEMA_FILE}"):
        raise DataError(f"--out {out} holds files that are no prepared data; name a new folder.")
    if not overwrite:
        raise DataError(
            f"--out {out} holds prepared data already; name a new folder, or pass --overwrite "
            "to replace it."
        )


def _replace(partial: str, out: str, overwrite: bool) -> None:
    parent = os.path.dirname(out)
    # Locked, so that nobody takes the old data for those of a process that is gone.
    with _locked(parent) if os.path.isdir(parent) else nullcontext():
        _check_place(out, overwrite)  # anything may have appeared there meanwhile
        if not path_manager.isdir(out):
            rename(partial, out)
        elif not path_manager.ls(out):
            remove_tree(out)
            rename(partial, out)
        else:
            # Two renames, so that no moment sees a mixture of the old and the new.
            old = f"{out}.{OLD}-{os.getpid()}"
            rename(out, old)
            rename(partial, out)
            _discard(old, partial)


def _discard(old: str, partial: str) -> None:
    """Remove old data, under the name of what the next process removes if this one is killed."""
    if os.path.isdir(old):  # a store of objects would copy them
        rename(old, partial)
        old = partial
    remove_tree(old)


@contextmanager
def scratch_folder(folder: PreparedFolder, wanted: str | None) -> Iterator[str]:
    """Give a local folder that is removed again, also after an error.

    Args:
        folder: What is being made: beside it there is room, unless it is remote.
        wanted: Where the user wants it; ``None`` leaves it to this function.

    Yields:
        Its path.
    """
    beside = folder.path if os.path.isdir(folder.path) else None
    path = tempfile.mkdtemp(prefix=".scratch-", dir=wanted or beside)
    try:
        yield path
    finally:
        shutil.rmtree(path)
