"""Raw values of a request become ids, by the vocabularies that training's values went through.

A value that no vocabulary has, or that is null, is unknown, as it was in training; a value of a
hashed table has a row; a value of a table without a vocabulary is an id already. A type is read as
preparing reads it, or refused.

Shape legend:
    N  values
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from torchrec_hilomoe.data.decode import decode_block, DecodedBlock
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.parquet import column_faults, is_list
from torchrec_hilomoe.data.prepare.column_kinds import EXACT, read_type, stored_type
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.vocabularies import bucket_ids, read_vocabulary
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact
from torchrec_hilomoe.serving.inputs import InputLayout

__all__ = ["Requests", "Rows", "Values", "names_of", "vocabulary_of"]


Values = Literal["raw", "ids"]
Rows = pa.Table | pa.RecordBatch | Mapping[str, Any]


def vocabulary_of(table: str) -> str:
    """Return where in an artifact the raw values of a table and their ids are."""
    return f"vocabularies/{table}.parquet"


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """Ids by raw value, all of one type; or the least numbers of buckets."""

    ids: Mapping[Any, int]
    kind: pa.DataType
    unknown: int
    least: np.ndarray | None


class Requests:
    """Turns rows of raw values, or of ids, into decoded rows.

    Args:
        artifact: Its schema and its vocabularies.

    Raises:
        ArtifactError: If a vocabulary is missing or unreadable.

    Attributes:
        layout: Which column is where among the program's inputs.
        columns: Those that rows need, in the schema's order.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.layout = InputLayout(artifact.schema)
        self._schema = self.layout.schema
        self._label = self._schema.label
        self.columns = [name for name in self._schema.columns if name != self._label]
        self._tables = {feature.name: feature.table for feature in self._schema.id_features}
        self._vocabularies = {
            table: _read(artifact, table, self._schema)
            for table, rule in self._schema.vocabularies.items()
            if rule.kind != "hashed"
        }

    def table_of(self, rows: Rows, columns: list[str] | None = None) -> pa.Table:
        """Return the needed columns of rows.

        Args:
            rows: An Arrow table or record batch, or an array or list of each column.
            columns: Those that are needed; by default all but the label.

        Raises:
            ValueError: If a column is missing, or is no column, or rows are something else.
        """
        columns = self.columns if columns is None else columns
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        names = names_of(rows)
        missing = [name for name in columns if names.count(name) != 1]
        if missing:
            how = "is missing" if missing[0] not in names else "occurs twice"
            raise ValueError(
                f"column {missing[0]!r} {how}; rows need the columns {', '.join(columns)}."
            )
        if not isinstance(rows, Mapping):
            return rows.select(columns)
        found = {name: _array(name, rows[name]) for name in columns}
        for name, column in found.items():
            if len(column) != len(found[columns[0]]):
                raise ValueError(
                    f"the rows are no columns of equal length: {columns[0]!r} has "
                    f"{len(found[columns[0]])}, {name!r} has {len(column)}; give each column a "
                    "value, or a list, of every row."
                )
        return pa.table(found)

    def encode(self, table: pa.Table) -> pa.Table:
        """Replace raw values by ids; a null list is empty.

        Raises:
            ValueError: If a column has a type that preparing does not read as values of the table.
        """
        for index, name in enumerate(table.column_names):
            if name in self._tables:
                column = table.column(index).combine_chunks()
                if isinstance(column, pa.ChunkedArray):  # of no chunk, in older releases of Arrow
                    column = pa.array([], column.type)
                table = table.set_column(index, name, self._ids(name, column))
        return table

    def decode(
        self, table: pa.Table, where: str = "the rows", layout: InputLayout | None = None
    ) -> DecodedBlock:
        """Check and cut rows of ids.

        Args:
            table: Of all columns but the label.
            where: What they are, for messages.
            layout: Of these columns; by default of all.

        Raises:
            ValueError: If a column has a wrong type, or a row is bad; it is named.
        """
        layout = self.layout if layout is None else layout
        label = pa.array(np.zeros(table.num_rows, dtype=np.int8))
        table = table.append_column(self._label, label)
        for index, field in enumerate(table.schema):
            if is_list(field.type) and pt.is_null(field.type.value_type):  # all are empty
                column = table.column(index).cast(pa.list_(pa.int64()))
                table = table.set_column(index, field.name, column)
            elif field.name in layout.schema.dense:
                table = table.set_column(index, field.name, _number(table.column(index)))
        if faults := column_faults(table.schema, layout.schema):
            raise ValueError(f"{where}: {'; '.join(faults)}. Give raw values, or other columns.")
        block = decode_block(table, layout.columns, None)
        if block.bad:
            row = min(block.bad)
            raise ValueError(
                f"{where}: {block.bad[row]}; correct it, or leave the row out. "
                f"Of {table.num_rows} rows {len(block.bad)} cannot be scored."
            )
        return block

    def _ids(self, name: str, column: pa.Array) -> pa.Array:
        if name in self.layout.list_columns and pt.is_null(column.type):
            column = column.cast(pa.large_list(pa.int64()))
        if not pt.is_large_list(stored_type(column.type)):
            return pa.array(self._ids_of(name, column, many=False))
        lists: Any = column.storage if isinstance(column, pa.ExtensionArray) else column
        # Preparing makes a null list an empty one. What lies under it is no entry of the row.
        lengths_B = pc.fill_null(pc.call_function("list_value_length", [lists]), 0)
        offsets = np.concatenate([[0], np.cumsum(lengths_B, dtype=np.int64)])
        ids = pa.array(self._ids_of(name, lists.flatten(), many=True))
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)

    def _ids_of(self, name: str, values: pa.Array, *, many: bool) -> np.ndarray:
        """``(N,)`` int64."""
        stored = stored_type(values.type)
        if pt.is_timestamp(stored):
            raise ValueError(
                f"column {name!r} has values of type {stored}, whose text depends on their "
                "unit; give the texts that were prepared, such as '2026-01-31 12:00:00' of "
                "whole seconds."
            )
        table = self._tables[name]
        vocabulary = self._vocabularies.get(table)
        is_number = vocabulary is not None and vocabulary.least is not None
        read = read_type(stored, moment=False)
        is_whole = is_number or read is None or not pt.is_floating(read)
        # Preparing takes whole numbers from a column of one number a row, whatever their type.
        if read is None or pt.is_nested(read) or (many and not is_whole):
            raise self._no_value(name, stored)
        values = self._cast(name, self._cast(name, values, stored), read)
        if pt.is_boolean(read):
            values = pc.cast(values, pa.int64())
        if not is_whole:
            numbers_N = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
            fits_N = (np.abs(numbers_N) < EXACT) & (numbers_N == np.floor(numbers_N))
            if not fits_N.all():
                raise self._no_value(name, stored, f", which {numbers_N[~fits_N][0]} is not")
            null_N = values.is_null().to_numpy(zero_copy_only=False)
            values = pa.array(numbers_N.astype(np.int64), mask=null_N)
        if vocabulary is None and table in self._schema.vocabularies:
            return hash_ids(values, self._schema.tables[table])
        kind = pa.int64() if vocabulary is None else vocabulary.kind
        # Of numbers, preparing takes the nearest one of 64 bits.
        values = self._cast(name, values, kind, safe=not is_number, of=stored)
        if vocabulary is None:
            return pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        if vocabulary.least is not None:
            numbers_N = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
            return bucket_ids(numbers_N, vocabulary.least, vocabulary.unknown)
        coded = values.dictionary_encode(null_encoding="encode")
        found = [vocabulary.ids.get(it, vocabulary.unknown) for it in coded.dictionary.to_pylist()]
        return np.array(found, dtype=np.int64)[coded.indices.to_numpy(zero_copy_only=False)]

    def _cast(
        self,
        name: str,
        values: pa.Array,
        kind: pa.DataType,
        *,
        safe: bool = True,
        of: pa.DataType | None = None,
    ) -> pa.Array:
        try:
            return pc.cast(values, kind, safe=safe)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"column {name!r} has values of type {of or values.type}, but those of table "
                f"{self._tables[name]!r} are {kind} ({' '.join(str(error).split())}); convert them."
            ) from error

    def _no_value(self, name: str, found: pa.DataType, why: str = "") -> ValueError:
        return ValueError(
            f"column {name!r} has values of type {found}, but values of table "
            f"{self._tables[name]!r} are whole numbers or texts{why}; convert them."
        )


def names_of(rows: Rows) -> list[str]:
    """Return the columns that rows have, also those that nothing needs.

    Raises:
        ValueError: If rows are neither Arrow's nor columns by name.
    """
    if isinstance(rows, Mapping):
        return list(rows)
    if isinstance(rows, pa.Table | pa.RecordBatch):
        return list(rows.schema.names)
    raise ValueError(
        f"the rows are a {type(rows).__name__}; give an Arrow table, such as "
        "pyarrow.table(FRAME), or an array or list of each column."
    )


def _array(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    # A text is a sequence of letters, and the order of a set is nobody's.
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise ValueError(
            f"column {name!r} is a {type(values).__name__}; give an array or a list, with a value "
            "of each row."
        )
    if isinstance(values, Iterator) or (isinstance(values, np.ndarray) and values.ndim > 1):
        values = list(values)
    try:
        return pa.array(values)
    except OverflowError:  # Arrow takes whole numbers of Python for signed ones
        for kind in (pa.uint64(), pa.list_(pa.uint64())):
            with suppress(OverflowError, pa.ArrowException):
                return pa.array(values, kind)
        raise ValueError(
            f"column {name!r} has whole numbers that 64 bits do not hold, signed or unsigned; "
            "correct them, or give all as texts."
        ) from None
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r} is a {type(values).__name__}{_entries(values)}, which is no column "
            f"of one type ({' '.join(str(error).split())}); give an array, or a list with a value, "
            "or a list of values, of each row."
        ) from error


def _entries(values: Any) -> str:
    """Say which types a list has in it, and those of lists in it."""
    if not isinstance(values, list | tuple):
        return ""
    flat = [
        it for value in values for it in (value if isinstance(value, list | tuple) else [value])
    ]
    names = sorted({type(it).__name__ for it in flat if it is not None})
    return f" of {' and '.join(names)}" if names else ""


def _number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decimals become float64, as preparing reads them; other types stay."""
    stored = stored_type(column.type)
    if not pt.is_decimal(stored):
        return column if stored == column.type else column.cast(stored)
    read = read_type(stored, moment=False)
    assert read is not None
    return column.cast(stored).cast(read).cast(pa.float64())


def _read(artifact: Artifact, table: str, schema: Schema) -> _Vocabulary:
    path = artifact.file(vocabulary_of(table))
    if path is None:
        raise ArtifactError(
            f"artifact {artifact.path} has no vocabulary of table {table!r}, so raw values have no "
            "ids. Export the checkpoint again with the data's folder: --data.path DIR"
        )
    is_bucketed = schema.vocabularies[table].kind == "bucketed"
    try:
        found = read_vocabulary(path)
        if is_bucketed:  # another engine may have stored other numbers
            found = found.set_column(0, "value", found["value"].cast(pa.float64()))
    except (DataError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} is no vocabulary ({' '.join(str(error).split())}).") from error
    kind = found.schema.field("value").type
    ids = dict(zip(found["value"].to_pylist(), found["id"].to_pylist(), strict=True))
    least = found.sort_by("id")["value"].to_numpy() if is_bucketed else None
    return _Vocabulary(ids=ids, kind=kind, unknown=schema.unknown_id(table), least=least)
