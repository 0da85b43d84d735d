"""Raw values of a request become ids, by the vocabularies that training's values went through.

A value that no vocabulary has, or that is null, is unknown, as it was in training; a value of a
hashed table has a row; a value of a table without a vocabulary is an id already.

Shape legend:
    N  values
"""

from collections.abc import Iterator, Mapping
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
from torchrec_hilomoe.data.prepare.column_kinds import stored_type
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.data.vocabularies import bucket_ids, read_vocabulary
from torchrec_hilomoe.serving.archive import ArtifactError
from torchrec_hilomoe.serving.artifact import Artifact
from torchrec_hilomoe.serving.inputs import InputLayout

__all__ = ["Requests", "Rows", "Values", "vocabulary_of"]

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
        if not isinstance(rows, pa.Table | Mapping):
            raise ValueError(
                f"the rows are a {type(rows).__name__}; give an Arrow table, such as "
                "pyarrow.table(FRAME), or an array or list of each column."
            )
        names = list(rows) if isinstance(rows, Mapping) else rows.column_names
        missing = [name for name in columns if names.count(name) != 1]
        if missing:
            how = "is missing" if missing[0] not in names else "occurs twice"
            raise ValueError(
                f"column {missing[0]!r} {how}; rows need the columns {', '.join(columns)}."
            )
        if not isinstance(rows, Mapping):
            return rows.select(columns)
        try:
            return pa.table({name: _array(name, rows[name]) for name in columns})
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(
                f"the rows are no columns of equal length ({' '.join(str(error).split())}); give "
                "an array or a list of each column."
            ) from error

    def encode(self, table: pa.Table) -> pa.Table:
        """Replace raw values by ids.

        Raises:
            ValueError: If a column has another type than the table's vocabulary.
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
        if not is_list(column.type):
            return pa.array(self._ids_of(name, column))
        # A null list stays null, which decoding tells; lists of no type are empty.
        offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
        ids = pa.array(self._ids_of(name, column.flatten()))
        mask = column.is_null() if column.null_count else None
        kind = pa.LargeListArray if pt.is_large_list(column.type) else pa.ListArray
        return kind.from_arrays(pa.array(offsets, column.offsets.type), ids, mask=mask)

    def _ids_of(self, name: str, values: pa.Array) -> np.ndarray:
        """``(N,)`` int64."""
        values = pc.cast(values, stored_type(values.type))
        if pt.is_boolean(values.type):
            values = pc.cast(values, pa.int64())  # as preparing reads it
        if pt.is_timestamp(values.type):
            raise ValueError(
                f"column {name!r} has values of type {values.type}, whose text depends on their "
                "unit; give the texts that were prepared, such as '2026-01-31 12:00:00' of "
                "whole seconds."
            )
        table = self._tables[name]
        vocabulary = self._vocabularies.get(table)
        is_number = vocabulary is not None and vocabulary.least is not None
        if pt.is_nested(values.type) or (pt.is_floating(values.type) and not is_number):
            raise ValueError(
                f"column {name!r} has values of type {values.type}, but values of table {table!r} "
                "are whole numbers or texts; convert them."
            )
        if vocabulary is None and table in self._schema.vocabularies:
            return hash_ids(values, self._schema.tables[table])
        kind = pa.int64() if vocabulary is None else vocabulary.kind
        try:
            # Of numbers, preparing takes the nearest one of 64 bits.
            values = pc.cast(values, kind, safe=not is_number)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"column {name!r} has values of type {values.type}, but those of table {table!r} "
                f"are {kind} ({' '.join(str(error).split())}); convert them."
            ) from error
        if vocabulary is None:
            return pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        if vocabulary.least is not None:
            numbers_N = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
            return bucket_ids(numbers_N, vocabulary.least, vocabulary.unknown)
        coded = values.dictionary_encode(null_encoding="encode")
        found = [vocabulary.ids.get(it, vocabulary.unknown) for it in coded.dictionary.to_pylist()]
        return np.array(found, dtype=np.int64)[coded.indices.to_numpy(zero_copy_only=False)]


def _array(name: str, values: Any) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, np.ndarray) and values.ndim > 1:
        values = list(values)
    if isinstance(values, Iterator):
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
