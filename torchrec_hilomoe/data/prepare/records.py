"""Raw files: found, decompressed, taken apart into records, the bad ones counted."""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.lines import LINE, LineFile, unzipped
from torchrec_hilomoe.runtime.paths import open_binary, path_manager

__all__ = [
    "BadRecords",
    "Fields",
    "find_raw",
    "good_lines",
    "read_json",
    "read_records",
    "which",
]

logger = logging.getLogger(__name__)

REPORTED_BAD_LINES = 3  # of each file; the rest are counted
SHOWN_CHARACTERS = 80


class BadRecords:
    """Counts malformed records, over all raw files of a data set.

    Args:
        limit: More than these are fatal.

    Attributes:
        counts: Those of each file, by its name without ``.gz``.
    """

    def __init__(self, limit: int) -> None:
        self.counts: Counter[str] = Counter()
        self._limit = limit

    def add(self, path: str, place: str, text: str) -> None:
        """Report one.

        Args:
            path: The file.
            place: Where in it, such as ``line 7``.
            text: What is there.

        Raises:
            DataError: If it is one too many.
        """
        name = path.rpartition("/")[2].removesuffix(".gz")
        self.counts[name] += 1
        what = f"{path} {place}: malformed: {text[:SHOWN_CHARACTERS]!r}"
        if self.counts[name] <= REPORTED_BAD_LINES:
            logger.warning("%s; skipped", what)
        if self.counts.total() > self._limit:
            raise DataError(
                f"more than max_bad_rows {self._limit} malformed records; the last is {what}. "
                "Repair the raw files, or raise --max_bad_rows."
            )


def find_raw(folder: str, name: str, source: str) -> str:
    """Return the path of a raw file, plain or gzipped.

    Args:
        folder: Where the user says that the raw files are.
        name: Of the plain file.
        source: Where to get it, for the message.

    Raises:
        DataError: If neither is there.
    """
    if not path_manager.isdir(folder):
        raise DataError(f"there is no folder {folder}. {source}")
    for path in (f"{folder.rstrip('/')}/{name}", f"{folder.rstrip('/')}/{name}.gz"):
        if path_manager.isfile(path):
            return path
    raise DataError(f"{folder} has neither {name} nor {name}.gz. {source}")


def read_records(path: str, pattern: str, bad: BadRecords, *, encoding: str) -> Iterator[pa.Table]:
    """Read a file of lines, some thousands at a time.

    Args:
        path: Plain, or gzipped if it ends in ``.gz``.
        pattern: A regular expression with named groups that a whole good line matches.
        bad: Is told of the other lines, which are skipped.
        encoding: Of the file.

    Yields:
        Good lines: a string column a group.

    Raises:
        DataError: If the file is unreadable, or too many lines are bad.
    """
    file = LineFile(path, pattern, encoding=encoding)
    for piece in file.pieces(file.columns().names):
        fields = good_lines(piece.load())
        for row, line in fields.bad.items():
            bad.add(path, piece.place(piece.first + row), line)
        yield fields.good


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Some lines, taken apart.

    Attributes:
        good: The fields of good lines.
        rows_N: Which lines those are, counted from the first of the piece.
        bad: The other lines, by their numbers.
    """

    good: pa.Table
    rows_N: np.ndarray
    bad: Mapping[int, str]


def good_lines(table: pa.Table) -> Fields:
    """Tell good lines of a piece of a :class:`~.lines.LineFile` from bad ones."""
    fields = table.drop_columns([LINE])
    good_N = fields.column(0).is_valid().to_numpy()
    bad = np.flatnonzero(~good_N)
    texts = table.column(LINE).take(pa.array(bad)).to_pylist()
    return Fields(
        good=fields if good_N.all() else fields.filter(pa.array(good_N)),
        rows_N=np.flatnonzero(good_N),
        bad=dict(zip(bad.tolist(), texts, strict=True)),
    )


def read_json(path: str) -> Any:
    """Read a whole JSON file, plain or gzipped.

    Raises:
        DataError: If it is unreadable or no JSON.
    """
    try:
        with open_binary(path) as raw, unzipped(path, raw) as binary:
            return json.loads(binary.read())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Download it again.") from error


def which(predicate: str, *values: Any, pattern: str | None = None) -> np.ndarray:
    """Say where an Arrow predicate holds; a null counts as no.

    Args:
        predicate: The name of a function of ``pyarrow.compute``.
        *values: Its arguments.
        pattern: The regular expression or text that it matches, if it does.
    """
    options = None if pattern is None else pc.MatchSubstringOptions(pattern)
    found = pc.call_function(predicate, list(values), options)
    return pc.fill_null(found, False).to_numpy(zero_copy_only=False)
