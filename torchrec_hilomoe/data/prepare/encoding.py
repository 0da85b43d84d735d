"""Typed columns become the columns of the prepared folder: ids, cut lists, numbers.

A raw value becomes an id: looked up in a vocabulary, hashed, or an id already.

Shape legend:
    N  values that are asked about
    V  values of the vocabulary; value ``v`` has id ``v + 1``
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.schema import PooledFeature, Schema
from torchrec_hilomoe.data.vocabularies import bucket_ids

__all__ = [
    "Bucketed",
    "Encoder",
    "Hashed",
    "Ids",
    "Numbers",
    "Texts",
    "encode",
    "encode_lists",
    "encoder_of",
    "encoders_of",
    "list_limits",
    "prepared_types",
]

SPARSE = 8  # a direct table may have so many places for each value, and at least the next number
DIRECT = 1 << 24


class Encoder(ABC):
    """Gives values of one table their ids."""

    @abstractmethod
    def encode(self, values: pl.Series) -> pl.Series:
        """Return the id of each value, Int64; a null is unknown."""


class Ids(Encoder):
    """Values that are ids already; whoever reads the data checks their range."""

    def encode(self, values: pl.Series) -> pl.Series:
        """Return the values; a null is 0."""
        return values.fill_null(0)


class Hashed(Encoder):
    """Any value has a row, which it may share.

    Args:
        rows: Of the table.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def encode(self, values: pl.Series) -> pl.Series:
        """Return the row of each value's hash; a null is 0."""
        return pl.Series(values.name, hash_ids(values.to_arrow(), self._rows))


class Numbers(Encoder):
    """A vocabulary of whole numbers.

    Args:
        values_V: Each once.
        unknown: The id of all others.
    """

    def __init__(self, values_V: np.ndarray, unknown: int) -> None:
        self._unknown = unknown
        span = int(values_V.max()) + 1 if len(values_V) else 0
        small = span <= max(SPARSE * len(values_V), DIRECT)
        self._direct = small and (not len(values_V) or values_V.min() >= 0)
        if self._direct:
            # Six times faster than a hash table.
            self._ids = np.full(span + 1, unknown, dtype=np.int64)
            self._ids[values_V] = np.arange(1, len(values_V) + 1)
        else:
            order = np.argsort(values_V)
            self._values, self._ids = values_V[order], order + 1

    def encode(self, values: pl.Series) -> pl.Series:
        """Look each value up."""
        wanted_N = values.fill_null(-1).to_numpy()
        if self._direct:
            last = len(self._ids) - 1  # a place that no value has
            # Seen as unsigned, a negative value is a huge one.
            ids_N = self._ids[np.minimum(wanted_N.view(np.uint64), np.uint64(last))]
            return pl.Series(values.name, ids_N)
        at_N = np.minimum(np.searchsorted(self._values, wanted_N), len(self._values) - 1)
        found_N = (self._values[at_N] == wanted_N) & values.is_not_null().to_numpy()
        return pl.Series(values.name, np.where(found_N, self._ids[at_N], self._unknown))


class Texts(Encoder):
    """A vocabulary of texts: to Polars, the categories of an enumeration.

    Args:
        values: Each once.
        unknown: The id of all others.
    """

    def __init__(self, values: pl.Series, unknown: int) -> None:
        self._kind = pl.Enum(values)
        self._unknown = unknown

    def encode(self, values: pl.Series) -> pl.Series:
        """Look each value up."""
        found = values.cast(pl.String).cast(self._kind, strict=False).to_physical()
        return (found.cast(pl.Int64) + 1).fill_null(self._unknown)


class Bucketed(Encoder):
    """A vocabulary of the least numbers of buckets.

    Args:
        least_V: Rising from minus infinity.
        unknown: The id of what is missing.
    """

    def __init__(self, least_V: np.ndarray, unknown: int) -> None:
        self._least, self._unknown = least_V, unknown

    def encode(self, values: pl.Series) -> pl.Series:
        """Find each number's bucket."""
        numbers_N = values.fill_null(float("nan")).to_numpy()
        return pl.Series(values.name, bucket_ids(numbers_N, self._least, self._unknown))


def encoder_of(values: pl.Series, unknown: int) -> Encoder:
    """Return the encoder of a vocabulary; value, or bucket, ``v`` of it has id ``v + 1``."""
    if values.dtype.is_float():
        return Bucketed(values.to_numpy(), unknown)
    if values.dtype.is_integer():
        return Numbers(values.cast(pl.Int64).to_numpy(), unknown)
    return Texts(values, unknown)


def encoders_of(schema: Schema, vocabularies: Mapping[str, pl.Series]) -> dict[str, Encoder]:
    """Return the encoder of each table.

    Args:
        schema: With the rows of every table.
        vocabularies: Raw values of counted and given tables, in the order of their ids.
    """
    encoders: dict[str, Encoder] = {}
    for table, rows in schema.tables.items():
        if table in vocabularies:
            encoders[table] = encoder_of(vocabularies[table], schema.unknown_id(table))
        else:
            encoders[table] = Hashed(rows) if table in schema.vocabularies else Ids()
    return encoders


def encode(rows: pl.DataFrame, schema: Schema, encoders: Mapping[str, Encoder]) -> pl.DataFrame:
    """Return the prepared columns of good rows that were parsed."""
    tables = {feature.name: feature.table for feature in schema.id_features}
    columns = []
    for name, (limit, keep) in list_limits(schema).items():
        column = pl.col(name)
        if limit is not None:
            column = column.list.tail(limit) if keep == "last" else column.list.head(limit)
        if name in tables:
            encoder = encoders[tables[name]]
            if limit is None:
                column = column.map_batches(encoder.encode, return_dtype=pl.Int64).cast(pl.Int32)
            else:
                kind = pl.List(pl.Int32)
                column = column.map_batches(partial(encode_lists, encoder), return_dtype=kind)
        columns.append(column)
    return rows.select(columns)


def encode_lists(encoder: Encoder, lists: pl.Series) -> pl.Series:
    """Look all entries up at once: ``list.eval`` would call Python for every row."""
    array = lists.to_arrow()
    offsets = array.offsets.to_numpy() - array.offsets[0].as_py()
    ids = encoder.encode(pl.Series(array.flatten())).cast(pl.Int32).to_arrow()
    return pl.Series(lists.name, pa.LargeListArray.from_arrays(offsets, ids))


def prepared_types(schema: Schema) -> pa.Schema:
    """Return the columns of a prepared folder and their types."""
    limits = list_limits(schema)
    ids = {feature.name for feature in schema.id_features}
    plain = {
        **dict.fromkeys(schema.dense, pa.float32()),
        schema.weight: pa.float32(),
        schema.label: pa.int8(),
    }
    kinds = []
    for name in schema.columns:
        kind = pa.int32() if name in ids else plain.get(name, pa.int64())
        kinds.append((name, kind if limits[name][0] is None else pa.list_(kind)))
    return pa.schema(kinds)


def list_limits(schema: Schema) -> dict[str, tuple[int | None, str]]:
    """Return how many entries lists have, none for other columns, and which end is kept."""
    found: dict[str, tuple[int | None, str]] = dict.fromkeys(schema.columns, (None, "last"))
    for group in schema.sequences:
        names = [f.name for f in group.fields] + ([group.time] if group.time else [])
        found |= dict.fromkeys(names, (group.max_length, group.keep))
    for feature in schema.pooled:
        if isinstance(feature, PooledFeature) and feature.max_length > 1:
            found[feature.name] = (feature.max_length, "last")
    return found
