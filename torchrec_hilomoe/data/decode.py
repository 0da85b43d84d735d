"""A block becomes arrays that a batch can be sliced from: checked, cut and in epoch order.

Everything that can be done once a block is done here, so that a batch costs slices only. A bad
row stays in its place, with weight 0 and nothing in it, until batches are collated: who reads which
row is arithmetic on row counts, which a removed row would upset.

Shape legend:
    N  rows of the block
    V  ids of a column, all rows together
    F  dense features
    K  keys of both jagged tensors, the unpooled ones first
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.columns import (
    check_parallel,
    dense_columns,
    Faults,
    flat_column,
    label_column,
    many_ids,
    many_integers,
    single_ids,
    weight_column,
)
from torchrec_hilomoe.data.ragged import Cut, Ragged
from torchrec_hilomoe.data.schema import Schema

__all__ = ["DecodedBlock", "Rows", "decode_block", "lengths_of_ids", "no_rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a block, as arrays that may be views of the block's.

    Attributes:
        ids: ``(V,)`` of each key, then the events' times of each group that has them; of any
            integer types.
        lengths: ``(K, N)`` int32: how many ids each row has of each key.
        dense: ``(N, F)`` float32.
        floats: ``(2, N)`` float32: labels and weights; the weight is 0 for a bad row, else what the
            schema's weight says, or 1.
        integers: ``(2, N)`` int64: groups and request times; 0 if the schema names no time.
    """

    ids: Sequence[np.ndarray]
    lengths: np.ndarray
    dense: np.ndarray
    floats: np.ndarray
    integers: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DecodedBlock:
    """A block, checked, cut to the schema's lengths and in the epoch's order.

    Attributes:
        rows: All of it.
        offsets: ``(N + 1,)`` for each of ``rows.ids``: where a row's begin. ``None`` is one a row.
        bad: Place in this order to a description: the stored row's number and its faults.
    """

    rows: Rows
    offsets: Sequence[np.ndarray | None]
    bad: Mapping[int, str]

    def pieces(self, borders: Sequence[int]) -> list[Rows]:
        """Return the rows between each border and the next, as views."""
        cuts = list(pairwise(borders))
        ids = [
            [array[start:stop] for start, stop in pairwise(_at(offsets, borders))]
            for array, offsets in zip(self.rows.ids, self.offsets, strict=True)
        ]
        whole = self.rows
        return [
            Rows(
                of_piece,
                whole.lengths[:, start:stop],
                whole.dense[start:stop],
                whole.floats[:, start:stop],
                whole.integers[:, start:stop],
            )
            for of_piece, (start, stop) in zip(zip(*ids, strict=True), cuts, strict=True)
        ]


def decode_block(table: pa.Table, schema: Schema, order_N: np.ndarray | None) -> DecodedBlock:
    """Check, cut and reorder a block.

    Args:
        table: Columns that ``column_types.check_columns`` accepts.
        schema: What they mean.
        order_N: The stored row at each place of the result; ``None`` is the stored order.

    Returns:
        The block, in that order.
    """
    rows = table.num_rows
    faults = Faults(rows)
    columns = _columns(table, schema, faults)
    dense_NF = dense_columns(table, schema.dense, faults)
    floats_2N = np.ones((2, rows), dtype=np.float32)
    floats_2N[0] = label_column(table, schema.label, faults)
    if schema.weight is not None:
        floats_2N[1] = weight_column(table, schema.weight, faults)
    integers_2N = np.zeros((2, rows), dtype=np.int64)
    integers_2N[0] = flat_column(table, schema.group, faults)
    if schema.time is not None:
        integers_2N[1] = flat_column(table, schema.time, faults)

    bad: dict[int, str] = {}
    if faults.bad_N.any():
        bad_N = faults.bad_N if order_N is None else faults.bad_N[order_N]
        for place in np.flatnonzero(bad_N).tolist():
            bad[place] = faults.of(place if order_N is None else int(order_N[place]))
        for array in (dense_NF, floats_2N.T, integers_2N.T):
            array[faults.bad_N] = 0
    if order_N is not None:
        dense_NF = dense_NF.take(order_N, axis=0)
        floats_2N = floats_2N.take(order_N, axis=1)
        integers_2N = integers_2N.take(order_N, axis=1)
    taken = _taken(schema, _Cutter(columns, order_N, faults.bad_N if bad else None))
    return DecodedBlock(
        rows=Rows(
            ids=[column.ids for column in taken],
            lengths=_lengths(schema, taken),
            dense=dense_NF,
            floats=floats_2N,
            integers=integers_2N,
        ),
        offsets=[column.offsets for column in taken],
        bad=bad,
    )


def no_rows(schema: Schema) -> Rows:
    """Return what a rank has whose lanes have ended before the others'."""
    like = lengths_of_ids(schema)
    keys = len(schema.unpooled_keys) + len(schema.pooled_keys)
    return Rows(
        ids=[np.zeros(0, dtype=np.int64) for _ in like],
        lengths=np.zeros((keys, 0), dtype=np.int32),
        dense=np.zeros((0, len(schema.dense)), dtype=np.float32),
        floats=np.zeros((2, 0), dtype=np.float32),
        integers=np.zeros((2, 0), dtype=np.int64),
    )


def lengths_of_ids(schema: Schema) -> list[int]:
    """Return, for each of :attr:`Rows.ids`, which of :attr:`Rows.lengths` are its own.

    Event times are as long as the first field of their group.
    """
    keys = [*schema.unpooled_keys, *schema.pooled_keys]
    timed = [group.fields[0].name for group in schema.sequences if group.time is not None]
    return [*range(len(keys)), *map(keys.index, timed)]


def _at(offsets: np.ndarray | None, borders: Sequence[int]) -> Sequence[int]:
    return borders if offsets is None else offsets.take(borders).tolist()


def _lengths(schema: Schema, taken: Sequence["_Taken"]) -> np.ndarray:
    keys = len(schema.unpooled_keys) + len(schema.pooled_keys)
    return np.stack([column.lengths for column in taken[:keys]])


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Columns of ids as stored, by name: one id a row, or many."""

    single: Mapping[str, np.ndarray]
    many: Mapping[str, Ragged]


def _columns(table: pa.Table, schema: Schema, faults: Faults) -> _Columns:
    single: dict[str, np.ndarray] = {}
    many: dict[str, Ragged] = {}
    lists = {feature.name for feature in schema.pooled if feature.max_length > 1}
    lists |= {field.name for field in schema.sequence_fields}
    for feature in schema.id_features:
        table_rows = schema.tables[feature.table]
        if feature.name in lists:
            many[feature.name] = many_ids(table, feature.name, table_rows, faults)
        else:
            single[feature.name] = single_ids(table, feature.name, table_rows, faults)
    for name in schema.event_times:
        many[name] = many_integers(table, name, faults)
    for group in schema.sequences:
        check_parallel(group, many, faults)
    return _Columns(single=single, many=many)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A column in the epoch's order; ``offsets`` of ``None`` is one id a row."""

    ids: np.ndarray
    offsets: np.ndarray | None
    lengths: np.ndarray


class _Cutter:
    """Takes the ids that are kept of each column, in the epoch's order.

    Args:
        columns: What is stored, by name.
        order_N: The stored row at each place; ``None`` keeps the order.
        bad_N: Stored rows that keep nothing; ``None`` if there are none.
    """

    def __init__(
        self, columns: _Columns, order_N: np.ndarray | None, bad_N: np.ndarray | None
    ) -> None:
        self._columns = columns
        self._order_N = order_N
        self._bad_N = bad_N

    def single(self, name: str) -> _Taken:
        """Take a column of one id a row; a bad row gets the padding id."""
        ids_N = self._columns.single[name]
        if self._bad_N is not None:
            ids_N = np.where(self._bad_N, 0, ids_N)
        if self._order_N is not None:
            ids_N = ids_N.take(self._order_N)
        return _Taken(ids_N, None, np.ones(len(ids_N), dtype=np.int32))

    def many(self, names: Sequence[str], max_length: int, keep: str) -> list[_Taken]:
        """Take columns of many ids a row, cut to ``max_length``; a bad row gets none."""
        taken: list[_Taken] = []
        cut = None
        for name in names:
            column = self._columns.many[name]
            # Parallel columns are cut alike, so what to keep is worked out once for all of them.
            if cut is None or not np.array_equal(cut.stored, column.offsets):
                cut = Cut(
                    column.offsets,
                    order_N=self._order_N,
                    bad_N=self._bad_N,
                    max_length=max_length,
                    keep=keep,
                )
            taken.append(_Taken(cut.take(column.values), cut.offsets, cut.lengths))
        return taken


def _taken(schema: Schema, cutter: _Cutter) -> list[_Taken]:
    """Return every key's column, then the times'."""
    keys = [cutter.single(field.name) for field in schema.candidate]
    times = []
    for group in schema.sequences:
        names = [field.name for field in group.fields]
        names += [group.time] if group.time is not None else []
        columns = cutter.many(names, group.max_length, group.keep)
        keys += columns[: len(group.fields)]
        times += columns[len(group.fields) :]
    for feature in schema.pooled:
        if feature.max_length == 1:
            keys.append(cutter.single(feature.name))
        else:
            keys += cutter.many([feature.name], feature.max_length, "last")
    return keys + times
