"""Raw tables in pieces: CSV read ahead in blocks, Parquet read by row group where it is used.

A piece knows where its rows are in the file, so that a bad one can be named.
"""

import gzip
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["CsvFile", "ParquetFile", "Piece", "RawFile"]

BLOCK_BYTES = 1 << 22  # Arrow reads up to 32 blocks ahead
BUFFER_BYTES = 1 << 20  # of each column that is read
UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a raw file.

    Attributes:
        path: The file.
        number: Which piece of it, from 0.
        first: How many rows of the file lie before, malformed lines not counted.
        load: Returns the rows, with the columns that were asked for.
        place: Says where a row of the file is, such as ``line 7``.
        malformed: Lines that are no rows, met while this piece was read: place and text.
    """

    path: str
    number: int
    first: int
    load: Callable[[], pa.Table]
    place: Callable[[int], str]
    malformed: Sequence[tuple[str, str]] = field(default_factory=tuple)


class RawFile(ABC):
    """A raw file that can be read in pieces, any number of times.

    Attributes:
        path: Where it is.
    """

    path: str

    @abstractmethod
    def columns(self) -> pa.Schema:
        """Return names and types of all columns, without reading rows.

        Raises:
            DataError: If the file is unreadable.
        """

    @abstractmethod
    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows, in order.

        Args:
            columns: Those that are needed.

        Raises:
            DataError: If the file is unreadable, now or when a piece is loaded.
        """


class CsvFile(RawFile):
    """Separated text; every column is a string until it is parsed.

    Args:
        path: Plain, or gzipped if it ends in ``.gz``.
        names: Of the columns, if the file has no header.
        separator: Between columns.
        source: Where to get the file, for messages.
        block_bytes: Text that is read at once.
    """

    def __init__(
        self,
        path: str,
        *,
        names: Sequence[str] = (),
        separator: str = ",",
        source: str = "",
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.path = path
        self._names = list(names)
        self._separator = separator
        self._source = source
        self._block_bytes = block_bytes

    def columns(self) -> pa.Schema:
        """Return the names in the header, or those given."""
        if self._names:
            return pa.schema([(name, pa.string()) for name in self._names])
        try:
            with open_binary(self.path) as raw, pa.input_stream(raw, self._compression()) as text:
                first = text.read(1 << 20).split(b"\n", 1)[0].decode().rstrip("\r")
        except UNREADABLE as error:
            raise self._unreadable(error) from error
        return pa.schema([(name.strip('"'), pa.string()) for name in first.split(self._separator)])

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield a piece for each block of text."""
        header = 0 if self._names else 1
        malformed: list[tuple[int, str]] = []
        reported = first = number = 0

        def skip(row: pc_csv.InvalidRow) -> str:
            malformed.append((row.number, row.text))
            return "skip"

        def place(row: int) -> str:
            # Line numbers count malformed lines, rows do not; each such line pushes the rest on.
            line = row + 1 + header
            return f"line {line + bisect_right(skipped_before, line)}"

        # Of each malformed line: its number less the number of those before it.
        skipped_before: list[int] = []
        try:
            with open_binary(self.path) as raw, pa.input_stream(raw, self._compression()) as text:
                reader = pc_csv.open_csv(
                    text,
                    # One thread, because only then are lines numbered; pieces are parsed in many.
                    pc_csv.ReadOptions(
                        use_threads=False,
                        block_size=self._block_bytes,
                        column_names=self._names or None,
                    ),
                    pc_csv.ParseOptions(delimiter=self._separator, invalid_row_handler=skip),
                    pc_csv.ConvertOptions(
                        column_types=dict.fromkeys(columns, pa.string()),
                        include_columns=list(columns),
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                )
                while True:
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        break
                    for count, (line, _) in enumerate(malformed[reported:], start=reported):
                        skipped_before.append(line - count)
                    new = [(f"line {line}", text) for line, text in malformed[reported:]]
                    reported = len(malformed)
                    table = pa.Table.from_batches([batch])
                    yield Piece(
                        path=self.path,
                        number=number,
                        first=first,
                        load=lambda table=table: table,
                        place=place,
                        malformed=new,
                    )
                    first, number = first + table.num_rows, number + 1
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _compression(self) -> str | None:
        return "gzip" if self.path.endswith(".gz") else None

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self.path} cannot be read ({reason}). {self._source}".rstrip())


class ParquetFile(RawFile):
    """A Parquet file, a piece for each row group or part of a large one.

    Args:
        path: Where it is.
        piece_rows: The most rows of a piece.
    """

    def __init__(self, path: str, *, piece_rows: int = 1 << 16) -> None:
        self.path = path
        self._piece_rows = piece_rows

    def columns(self) -> pa.Schema:
        """Return the schema in the footer."""
        try:
            with open_binary(self.path) as source, pq.ParquetFile(source) as file:
                return file.schema_arrow
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows of small row groups to be read when they are loaded, in whichever thread.

        A large one is read here, a piece at a time: it may not fit memory, and pieces of it cannot
        be read without what is before them.
        """
        first = 0
        try:
            with open_binary(self.path) as source, self._open(source) as file:
                for number, load in enumerate(self._loads(file, columns)):
                    yield Piece(
                        path=self.path,
                        number=number,
                        first=first,
                        load=load.rows,
                        place=lambda row: f"row {row}",
                    )
                    first += load.count
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _loads(self, file: pq.ParquetFile, columns: Sequence[str]) -> Iterator["_Load"]:
        footer = file.metadata
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            if 0 < rows <= self._piece_rows:
                yield _Load(count=rows, rows=lambda group=group: self._read(footer, group, columns))
                continue
            for batch in file.iter_batches(
                self._piece_rows, row_groups=[group], columns=list(columns), use_threads=False
            ):
                table = pa.Table.from_batches([batch])
                yield _Load(count=batch.num_rows, rows=lambda table=table: table)

    def _read(self, footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> pa.Table:
        try:
            with open_binary(self.path) as source, self._open(source, footer) as file:
                return file.read_row_group(group, columns=list(columns), use_threads=False)
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    @staticmethod
    def _open(source: IO[bytes], footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
        # Without a buffer of its own, Arrow would hold all of a row group before its first row.
        return pq.ParquetFile(
            source,
            metadata=footer,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
        )

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(
            f"{self.path} cannot be read as Parquet ({reason}). Copy it again from a whole copy."
        )


@dataclass(frozen=True, kw_only=True)
class _Load:
    """How many rows a piece has, and what returns them."""

    count: int
    rows: Callable[[], pa.Table]
