"""What the first rows of somebody's files show of each column."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_kinds import is_text, read_type, stored_type
from torchrec_hilomoe.data.prepare.sources import ParquetFile
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["Kind", "SeenColumn", "read_columns"]

Kind = Literal["text", "integer", "number", "moment", "fingerprint", "unreadable"]
SEPARATORS = "^|;"  # of lists in a text; commas and spaces are in titles, too
CSV = (".csv", ".csv.gz")
# What the values of several files are joined as.
DTYPES: Mapping[Kind, pl.DataType] = {
    "text": pl.String(),
    "integer": pl.Int64(),
    "number": pl.Float64(),
    "moment": pl.Datetime("us"),
    "fingerprint": pl.String(),
    "unreadable": pl.Null(),
}


@dataclass(frozen=True, kw_only=True)
class SeenColumn:
    """A column of the rows that were looked at.

    Attributes:
        name: As in the files.
        kind: Of its values, or of the entries of its lists.
        values: One a row, or the list of a row.
        stored: Its type in the file, for messages.
        separator: Between the entries of lists that are stored as text; empty for others.
        untyped: Whether the file has no value to tell the kind by: it fits every kind, and as a
            list it fits lists of every kind.
    """

    name: str
    kind: Kind
    values: pl.Series
    stored: str
    separator: str = ""
    untyped: bool = False

    @property
    def is_list(self) -> bool:
        """Whether a row has many values."""
        return isinstance(self.values.dtype, pl.List)

    @cached_property
    def entries(self) -> pl.Series:
        """All values that are there, those of lists one after the other."""
        values = self.values.explode() if self.is_list else self.values
        return values.drop_nulls()

    @cached_property
    def distinct(self) -> pl.Series:
        """Each value once."""
        return self.entries.unique()

    @cached_property
    def words(self) -> frozenset[str]:
        """Of its name: ``lastClicked_items`` has last, clicked, items, item."""
        apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name).lower()
        found = re.findall(r"[a-z]+", apart)
        return frozenset([*found, *(word.removesuffix("s") for word in found)])

    @property
    def longest(self) -> int:
        """The most entries of a row."""
        return int(self.values.list.len().fill_null(0).to_numpy().max())

    @property
    def missing(self) -> float:
        """Share of rows without a value."""
        return self.values.null_count() / max(len(self.values), 1)

    def is_click(self) -> bool:
        """Whether it holds 0 and 1, and both."""
        if self.is_list or self.kind not in ("integer", "number") or self.missing:
            return False
        return set(self.distinct.to_list()) == {0, 1}


def read_columns(files: Sequence[str], rows: int) -> list[SeenColumn]:
    """Look at the first rows of files of one table.

    Args:
        files: Parquet, or CSV with a header, plain or gzipped.
        rows: How many to look at, over all files.

    Raises:
        DataError: If a file is missing, unreadable, without a row, or has other columns.
    """
    frames: list[list[SeenColumn]] = []
    for path in files:
        share = -(-rows // len(files))
        if not path_manager.isfile(path):
            raise DataError(f"there is no file {path}. Name Parquet or CSV files.")
        if path.endswith(".parquet"):
            frames.append(_of_parquet(path, share))
        elif path.endswith(CSV):
            frames.append(_of_csv(path, share))
        else:
            raise DataError(f"{path} is neither .parquet nor .csv. Convert it, or rename it.")
        if not frames[-1] or not len(frames[-1][0].values):
            raise DataError(f"{path} has no rows. Name files that have.")
    _refuse_unlike(files, frames)
    by_name = [{column.name: column for column in frame} for frame in frames]
    return [_joined([frame[name] for frame in by_name]) for name in by_name[0]]


def _refuse_unlike(files: Sequence[str], frames: Sequence[Sequence[SeenColumn]]) -> None:
    """Refuse files whose columns have other names, or types that prepare reads apart.

    Raises:
        DataError: Naming two files and the columns.
    """
    # Of each column's kinds, the first file and what it holds; more files bring no more kinds.
    seen: dict[str, dict[tuple[Kind, bool, bool], tuple[int, SeenColumn]]] = {}
    for at, frame in enumerate(frames):
        apart = dict.fromkeys(seen.keys() ^ {column.name for column in frame}, 0) if at else {}
        for column in frame:
            before = seen.setdefault(column.name, {})
            for number, other in before.values():
                if _common_kind([other, column]) is None:
                    apart.setdefault(column.name, number)
            before.setdefault((column.kind, column.is_list, column.untyped), (at, column))
        if apart:
            first = min(apart.values())
            names = sorted(name for name, number in apart.items() if number == first)
            raise DataError(
                f"{files[first]} and {files[at]} differ in {', '.join(names)}; name files of one "
                "table."
            )


def _common_kind(columns: Sequence[SeenColumn]) -> Kind | None:
    """Return the kind of a column of several files, None if prepare would refuse them."""
    typed = [column for column in columns if not column.untyped]
    kinds: set[Kind] = {column.kind for column in typed} or {"text"}
    # A column that nothing can be made of may hold anything.
    readable = [column for column in columns if column.kind != "unreadable"]
    lists = {column.is_list for column in readable if column.is_list or not column.untyped}
    if len(lists) > 1 and kinds != {"unreadable"}:
        return None
    if len(kinds) > 1 and kinds & {"number", "fingerprint"}:
        kinds -= {"integer"}  # which is read as they are
    return kinds.pop() if len(kinds) == 1 else None


def _joined(columns: Sequence[SeenColumn]) -> SeenColumn:
    """Return a column of several files that has a common kind."""
    if len(columns) == 1:
        return columns[0]
    kind = _common_kind(columns)
    assert kind is not None
    dtype = DTYPES[kind]
    if kind != "unreadable" and any(column.is_list for column in columns):
        dtype = pl.List(dtype)
    return SeenColumn(
        name=columns[0].name,
        kind=kind,
        values=pl.concat([_retyped(column, dtype) for column in columns]),
        stored=" and ".join(dict.fromkeys(column.stored for column in columns)),
        separator=next((column.separator for column in columns if column.separator), ""),
        untyped=all(column.untyped for column in columns),
    )


def _retyped(column: SeenColumn, dtype: pl.DataType) -> pl.Series:
    if dtype == pl.Null or (column.untyped and not column.is_list):
        return pl.Series(column.name, [None] * len(column.values), dtype)
    return column.values.cast(dtype)


def _of_parquet(path: str, rows: int) -> list[SeenColumn]:
    file = ParquetFile(path)
    stored = file.columns()
    if repeated := sorted({name for name in stored.names if stored.names.count(name) > 1}):
        raise DataError(f"{path} has columns {repeated} twice; rename one of each.")
    kinds = {field.name: read_type(field.type, moment=True) for field in stored}
    known = pa.schema([(name, kind) for name, kind in kinds.items() if kind is not None])
    batches: list[pl.DataFrame] = []
    for batch in file.batches(known):
        batches.append(batch)
        if sum(map(len, batches)) >= rows:
            break
    if not batches:
        return []
    frame = pl.concat(batches).head(rows)
    columns = []
    for field in stored:
        if field.name not in known.names:
            values = pl.Series([None] * len(frame), dtype=pl.Null)
            columns.append(
                SeenColumn(
                    name=field.name, kind="unreadable", values=values, stored=str(field.type)
                )
            )
            continue
        column = _column(frame[field.name], str(field.type))
        kind = stored_type(field.type)
        if pa.types.is_uint64(kind.value_type if pa.types.is_large_list(kind) else kind):
            column = replace(column, kind="fingerprint")
        columns.append(replace(column, untyped=is_text(field.type) is None))
    return columns


def _of_csv(path: str, rows: int) -> list[SeenColumn]:
    try:
        local = path_manager.get_local_path(path)
        frame = pl.read_csv(local, n_rows=rows, infer_schema_length=rows, try_parse_dates=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as CSV ({reason}).") from error
    columns = [_column(series, str(series.dtype)) for series in frame]
    return [replace(column, untyped=column.missing == 1) for column in columns]


def _column(values: pl.Series, stored: str) -> SeenColumn:
    separator = ""
    if values.dtype == pl.String:
        separator = _separator(values)
        if separator:
            values = values.str.split(separator)
            numbers = values.cast(pl.List(pl.Int64), strict=False)
            if numbers.explode().null_count() == values.explode().null_count():
                values = numbers
    inner = values.dtype.inner if isinstance(values.dtype, pl.List) else values.dtype
    if inner == pl.Boolean:
        values = values.cast(pl.List(pl.Int8) if isinstance(values.dtype, pl.List) else pl.Int8)
    return SeenColumn(
        name=values.name, kind=_kind(inner), values=values, stored=stored, separator=separator
    )


def _kind(kind: object) -> Kind:
    assert isinstance(kind, pl.DataType | type)
    if kind == pl.String or kind == pl.Null:
        return "text"
    if kind in (pl.Date, pl.Datetime):
        return "moment"
    if kind == pl.Boolean or kind.is_integer():
        return "integer"
    return "number" if kind.is_numeric() else "unreadable"


def _separator(values: pl.Series) -> str:
    """What stands between entries in most rows of a text; empty if nothing does."""
    there = values.drop_nulls()
    for separator in SEPARATORS:
        if 2 * there.str.contains(separator, literal=True).sum() > len(there):
            return separator
    return ""
