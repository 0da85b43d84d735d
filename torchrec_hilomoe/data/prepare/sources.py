"""Raw files in batches: memory does not grow with a file or its row groups.

Reading stays with Arrow. Polars' CSV reader fills short lines with nulls, so that they are not
known to be malformed, its Parquet reader holds whole row groups and checks no checksums, and both
want local files.
"""

import gzip
import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_kinds import holds_bytes
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["MALFORMED", "PLACE", "ROW", "CsvFile", "LineFile", "ParquetFile", "RawFile", "unzipped"]

# Columns beside those of a file: the number of a row; where a person finds it; the text of a line
# that is no row, whose other columns are null, or what keeps a row of Parquet from being read.
ROW, PLACE, MALFORMED = "__row", "__place", "__malformed"
BLOCK_BYTES = 1 << 22
BATCH_ROWS = 1 << 16  # at most; fewer of wide rows, for a batch to be as large as a block
BUFFER_BYTES = 1 << 20  # of each column that is read
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error)


class RawFile(ABC):
    """A raw file that can be read any number of times.

    Attributes:
        path: Where it is.
        unit: What ``PLACE`` counts, such as ``line``.
    """

    path: str
    unit: str

    @abstractmethod
    def columns(self) -> pa.Schema:
        """Return names and types of all columns, without reading rows.

        Raises:
            DataError: If the file is unreadable.
        """

    def rows(self) -> int:
        """Return how many rows there are, malformed lines not counted.

        Raises:
            DataError: If the file is unreadable.
        """
        return sum(len(batch) - batch[ROW].null_count() for batch in self.batches(self.columns()))

    @abstractmethod
    def batches(self, columns: pa.Schema) -> Iterator[pl.DataFrame]:
        """Yield the rows in order, with ``ROW``, ``PLACE`` and ``MALFORMED``.

        Args:
            columns: Those that are needed, and the types that they are cast to.

        Raises:
            DataError: If the file is unreadable.
        """


class CsvFile(RawFile):
    """Separated text; every column is a string until it is parsed.

    Args:
        path: Plain, or gzipped if it ends in ``.gz``; with or without a byte order mark.
        names: Of the columns, if the file has no header.
        separator: Between columns.
        source: Where to get the file, for messages.
        block_bytes: Text that is read at once.
    """

    unit = "line"

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
            with open_binary(self.path) as raw, unzipped(self.path, raw) as text:
                first = text.read(1 << 20).split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
        except UNREADABLE as error:
            raise self._unreadable(error) from error
        return pa.schema([(name.strip('"'), pa.string()) for name in first.split(self._separator)])

    def batches(self, columns: pa.Schema) -> Iterator[pl.DataFrame]:
        """Yield a batch for each block of text."""
        header = 0 if self._names else 1
        malformed: list[tuple[int, str]] = []
        told = first = 0
        # Of each malformed line: its number less the number of those before it.
        skipped_before: list[int] = []

        def skip(row: pc_csv.InvalidRow) -> str:
            malformed.append((row.number, row.text))
            return "skip"

        try:
            with open_binary(self.path) as raw, unzipped(self.path, raw) as text:
                for batch in pc_csv.open_csv(
                    text,
                    # One thread, because only then are lines numbered.
                    pc_csv.ReadOptions(
                        use_threads=False,
                        block_size=self._block_bytes,
                        column_names=self.columns().names,
                        skip_rows=header,
                    ),
                    pc_csv.ParseOptions(delimiter=self._separator, invalid_row_handler=skip),
                    pc_csv.ConvertOptions(
                        column_types=dict.fromkeys(columns.names, pa.string()),
                        include_columns=columns.names,
                        strings_can_be_null=True,
                        null_values=[""],
                    ),
                ):
                    # Taken once: Arrow parses the next block meanwhile, and may add lines of it.
                    lines = malformed[told:]
                    for count, (line, _) in enumerate(lines, start=told):
                        skipped_before.append(line - count)
                    places = np.arange(batch.num_rows) + first + header + 1
                    # Each malformed line pushes the rest on.
                    places += np.searchsorted(skipped_before, places, "right")
                    frame = _numbered(pa.Table.from_batches([batch]), first, places)
                    if lines:
                        bad = pl.DataFrame(
                            lines, {PLACE: pl.Int64, MALFORMED: pl.String}, orient="row"
                        )
                        frame = pl.concat([frame, bad], how="diagonal").sort(PLACE)
                        told += len(lines)
                    yield frame
                    first += batch.num_rows
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self.path} cannot be read ({reason}). {self._source}".rstrip())


class LineFile(RawFile):
    """Lines of text that a pattern takes apart.

    The columns are the pattern's groups, strings; a line that it does not match is malformed.

    Args:
        path: Plain, or gzipped if it ends in ``.gz``.
        pattern: A regular expression with named groups that a whole good line matches.
        encoding: Of the file.
    """

    unit = "line"

    def __init__(self, path: str, pattern: str, *, encoding: str) -> None:
        self.path = path
        self._encoding = encoding
        self._whole = f"^(?:{pattern})$"

    def columns(self) -> pa.Schema:
        """Return the groups' names."""
        fields = self._take_apart(pl.DataFrame({"line": [""]}, {"line": pl.String}))
        return pa.schema([(name, pa.string()) for name in fields.columns])

    def batches(self, columns: pa.Schema) -> Iterator[pl.DataFrame]:
        """Yield a batch for each block of lines."""
        first = 0
        for block in self._blocks():
            lines = pl.read_lines(io.BytesIO(block), name="line")
            numbers = pl.int_range(first, first + pl.len(), dtype=pl.Int64)
            fields = self._take_apart(lines)
            bad = fields[:, 0].is_null()
            yield lines.select(
                *fields.select(columns.names),
                numbers.alias(ROW),
                (numbers + 1).alias(PLACE),
                pl.when(bad).then(pl.col("line").str.strip_chars_end("\r")).alias(MALFORMED),
            )
            first += lines.height

    def _take_apart(self, lines: pl.DataFrame) -> pl.DataFrame:
        line = pl.col("line").str.strip_chars_end("\r")
        return lines.select(line.str.extract_groups(self._whole).alias("fields")).unnest("fields")

    def _blocks(self) -> Iterator[bytes]:
        """Yield the file as UTF-8, cut after ends of lines."""
        rest = b""
        try:
            with open_binary(self.path) as raw, unzipped(self.path, raw) as content:
                while block := content.read(BLOCK_BYTES):
                    whole, newline, after = (rest + block).rpartition(b"\n")
                    rest = after
                    if newline:
                        yield (whole + newline).decode(self._encoding).encode()
            if rest:
                yield rest.decode(self._encoding).encode()
        except UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read ({error}). Download it again.") from error


class ParquetFile(RawFile):
    """A Parquet file.

    Args:
        path: Where it is.
        batch_rows: The most rows of a batch.
    """

    unit = "row"

    def __init__(self, path: str, *, batch_rows: int = BATCH_ROWS) -> None:
        self.path = path
        self._batch_rows = batch_rows

    def columns(self) -> pa.Schema:
        """Return the schema in the footer."""
        try:
            with open_binary(self.path) as source, pq.ParquetFile(source) as file:
                return file.schema_arrow
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def rows(self) -> int:
        """Return how many rows the footer says."""
        try:
            with open_binary(self.path) as source:
                return pq.read_metadata(source).num_rows
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def batches(self, columns: pa.Schema) -> Iterator[pl.DataFrame]:
        """Yield batches of rows, also of a row group that does not fit memory."""
        first = 0
        try:
            # Without a buffer of its own, Arrow would hold all of a row group before its first row.
            with (
                open_binary(self.path) as source,
                pq.ParquetFile(
                    source,
                    page_checksum_verification=True,
                    pre_buffer=False,
                    buffer_size=BUFFER_BYTES,
                ) as file,
            ):
                for batch in file.iter_batches(
                    _rows_at_once(file.metadata, self._batch_rows), columns=columns.names
                ):
                    found = {f.name: self._cast(batch.column(f.name), f) for f in columns}
                    table = pa.table({name: column.values for name, column in found.items()})
                    places = first + np.arange(batch.num_rows)
                    frame = _numbered(table, first, places)
                    for name, column in found.items():
                        if column.bad_N is not None:
                            reason = pl.lit(f"{name} holds bytes that are no UTF-8")
                            bad = pl.when(pl.Series(column.bad_N)).then(reason)
                            frame = frame.with_columns(pl.coalesce(MALFORMED, bad).alias(MALFORMED))
                    yield frame
                    first += batch.num_rows
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _cast(self, column: pa.Array, wanted: pa.Field) -> "_Cast":
        try:
            return _cast(column, wanted.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.path}: column {wanted.name!r} is {column.type} and cannot be read as "
                f"{wanted.type} ({reason}). Convert the column, or name another file."
            ) from error

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(
            f"{self.path} cannot be read as Parquet ({reason}). Copy it again from a whole copy."
        )


def unzipped(path: str, raw: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """Return the content of an open file, decompressed if its name ends in ``.gz``."""
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _rows_at_once(footer: pq.FileMetaData, most: int) -> int:
    """Return how many rows are about as large as a block."""
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    return max(1, min(most, BLOCK_BYTES * footer.num_rows // max(size, 1)))


def _numbered(table: pa.Table, first: int, places: np.ndarray) -> pl.DataFrame:
    columns = {name: pl.Series(name, table[name]) for name in table.column_names}
    # Rows of a table without columns have numbers, too.
    numbers = {ROW: first + np.arange(len(places)), PLACE: places}
    return pl.DataFrame({**columns, **numbers}).with_columns(
        pl.lit(None, pl.String).alias(MALFORMED)
    )


@dataclass(frozen=True, kw_only=True)
class _Cast:
    """A column as it is wanted.

    Attributes:
        values: N of them.
        bad_N: Whether a value, or an entry of a list, is null because it cannot be read; ``None``
            where all can.
    """

    values: pa.Array
    bad_N: np.ndarray | None = None


def _cast(array: pa.Array, kind: pa.DataType) -> _Cast:
    """Cast what Arrow casts, and lists and dictionaries of all kinds, whose entries are cast."""
    stored = array.type
    if isinstance(stored, pa.BaseExtensionType):
        return _cast(array.storage, kind)
    if pa.types.is_dictionary(stored):
        return _cast(array.dictionary_decode(), kind)
    if pa.types.is_large_list(kind) and not pa.types.is_null(stored):
        # Null rows may stand over entries, and slices over those of others.
        lengths = pc.call_function("list_value_length", [array])
        offsets = pc.call_function("cumulative_sum", [pc.fill_null(lengths, 0).cast(pa.int64())])
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), offsets])
        entries = _cast(pc.call_function("list_flatten", [array]), kind.value_type)
        lists = pa.LargeListArray.from_arrays(
            offsets, entries.values, type=kind, mask=array.is_null()
        )
        if entries.bad_N is None:
            return _Cast(values=lists)
        bad_before = np.concatenate([[0], np.cumsum(entries.bad_N)])[offsets.to_numpy()]
        return _Cast(values=lists, bad_N=np.diff(bad_before) > 0)
    if pa.types.is_large_string(kind) and holds_bytes(stored):
        return _decode(array)
    if pa.types.is_timestamp(kind) and pa.types.is_timestamp(stored):
        return _Cast(values=_round_down(array, kind))
    return _Cast(values=array.cast(kind))


def _decode(array: pa.Array) -> _Cast:
    """Return texts, large strings; null for what is no UTF-8."""
    try:
        texts = array.cast(pa.large_string())
        texts.validate(full=True)  # a cast takes what is said to be text for text
        return _Cast(values=texts)
    except pa.ArrowInvalid:  # it does not say which
        content = array.cast(pa.large_binary())
        good_N = np.array([value is None or _is_utf8(value) for value in content.to_pylist()])
        nothing = pa.scalar(None, content.type)
        content = pc.call_function("if_else", [pa.array(good_N), content, nothing])
        return _Cast(values=content.cast(pa.large_string()), bad_N=~good_N)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _round_down(moments: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast to a coarser unit, the earlier one where there is a fraction, which Arrow refuses."""
    per_unit = pa.scalar(PER_SECOND[moments.type.unit] // PER_SECOND[kind.unit], pa.int64())
    counts = moments.cast(pa.int64())
    toward_zero = pc.call_function("divide", [counts, per_unit])
    cut = pc.call_function("multiply", [toward_zero, per_unit])
    over = pc.call_function("less", [counts, cut]).cast(pa.int64())
    return pc.call_function("subtract", [toward_zero, over]).cast(kind)
