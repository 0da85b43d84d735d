"""A block becomes arrays that a batch can be sliced from: checked, cut and in epoch order.

Everything that can be done once a block is done here, so that a batch costs slices only. A bad
row stays in its place, with weight 0 and nothing in it, until batches are collated: who reads which
row is arithmetic on row counts, which a removed row would upset.

Shape legend:
    N  rows of the block
    V  ids of a column, all rows together
    F  dense features
    S  keys of one id a row
    G  kinds of lengths: one a row, then those of each of ``ColumnLayout.lists``
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.columns import (
    check_parallel,
    dense_columns,
    flat_column,
    label_column,
    many_ids,
    many_integers,
    RowErrors,
    single_ids,
    weight_column,
)
from torchrec_hilomoe.data.layout import ColumnLayout, ParallelLists
from torchrec_hilomoe.data.ragged import cut_alike, Ragged

__all__ = ["DecodedBlock", "Rows", "decode_block", "no_rows"]


@dataclass(slots=True)
class Rows:
    """Rows of a block, as arrays that may be views of the block's; nobody writes to them.

    Attributes:
        singles: ``(S, N)`` ids of ``ColumnLayout.singles``.
        lists: ``(V,)`` of each column of ``ColumnLayout.lists``, of any integer types.
        lengths: ``(G, N)`` int32: ones, and how many entries each row has of each list.
        dense: ``(N, F)`` float32.
        floats: ``(2, N)`` float32: labels and weights; the weight is 0 for a bad row, else what the
            schema's weight says, or 1.
        integers: ``(2, N)`` int64: groups and request times; 0 if the schema names no time.
    """

    singles: np.ndarray
    lists: Sequence[np.ndarray]
    lengths: np.ndarray
    dense: np.ndarray
    floats: np.ndarray
    integers: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DecodedBlock:
    """A block, checked, cut to the schema's lengths and in the epoch's order.

    Attributes:
        rows: All of it.
        offsets: ``(N + 1,)`` for each of ``rows.lists``: where a row's begin.
        bad: Place in this order to a description: the stored row's number and its errors.
    """

    rows: Rows
    offsets: Sequence[np.ndarray]
    bad: Mapping[int, str]

    def pieces(self, borders: Sequence[int]) -> list[Rows]:
        """Return the rows between each border and the next, as views."""
        whole = self.rows
        lists = [
            [array[start:stop] for start, stop in pairwise(offsets.take(borders).tolist())]
            for array, offsets in zip(whole.lists, self.offsets, strict=True)
        ]
        cuts = list(pairwise(borders))
        of_pieces = zip(*lists, strict=True) if lists else [()] * len(cuts)
        return [
            Rows(
                whole.singles[:, start:stop],
                of_piece,
                whole.lengths[:, start:stop],
                whole.dense[start:stop],
                whole.floats[:, start:stop],
                whole.integers[:, start:stop],
            )
            for of_piece, (start, stop) in zip(of_pieces, cuts, strict=True)
        ]


def decode_block(table: pa.Table, layout: ColumnLayout, order_N: np.ndarray | None) -> DecodedBlock:
    """Check, cut and reorder a block.

    Args:
        table: Columns that ``parquet.check_columns`` accepts.
        layout: What they mean, and where they go.
        order_N: The stored row at each place of the result; ``None`` is the stored order.

    Returns:
        The block, in that order.
    """
    schema, rows = layout.schema, table.num_rows
    errors = RowErrors(rows)
    singles_SN = _singles(table, layout, errors)
    lists = [_parallel(table, parallel, schema.tables, errors) for parallel in layout.lists]
    dense_FN = dense_columns(table, schema.dense, errors)
    floats_2N = np.ones((2, rows), dtype=np.float32)
    floats_2N[0] = label_column(table, schema.label, errors)
    if schema.weight is not None:
        floats_2N[1] = weight_column(table, schema.weight, errors)
    integers_2N = np.zeros((2, rows), dtype=np.int64)
    integers_2N[0] = flat_column(table, schema.group, errors)
    if schema.time is not None:
        integers_2N[1] = flat_column(table, schema.time, errors)

    bad: dict[int, str] = {}
    if errors.bad_N.any():
        bad_N = errors.bad_N if order_N is None else errors.bad_N[order_N]
        for place in np.flatnonzero(bad_N).tolist():
            bad[place] = errors.of(place if order_N is None else int(order_N[place]))
        for array in (singles_SN.T, dense_FN.T, floats_2N.T, integers_2N.T):
            array[errors.bad_N] = 0
    dense_NF = np.ascontiguousarray(dense_FN.T)
    if order_N is not None:
        singles_SN = singles_SN.take(order_N, axis=1)
        dense_NF = dense_NF.take(order_N, axis=0)
        floats_2N = floats_2N.take(order_N, axis=1)
        integers_2N = integers_2N.take(order_N, axis=1)
    taken = [
        cut_alike(
            columns,
            order_N=order_N,
            bad_N=errors.bad_N if bad else None,
            max_length=parallel.max_length,
            keep=parallel.keep,
        )
        for columns, parallel in zip(lists, layout.lists, strict=True)
    ]
    lengths_GN = np.ones((1 + len(taken), rows), dtype=np.int32)
    for index, cut in enumerate(taken, start=1):
        lengths_GN[index] = cut.lengths
    return DecodedBlock(
        rows=Rows(
            singles=singles_SN,
            lists=[values for cut in taken for values in cut.values],
            lengths=lengths_GN,
            dense=dense_NF,
            floats=floats_2N,
            integers=integers_2N,
        ),
        offsets=[cut.offsets for cut in taken for _ in cut.values],
        bad=bad,
    )


def no_rows(layout: ColumnLayout) -> Rows:
    """Return what a rank has whose shards have ended before the others'."""
    columns = sum(len(parallel.columns) for parallel in layout.lists)
    return Rows(
        singles=np.zeros((len(layout.singles), 0), dtype=layout.single_type),
        lists=[np.zeros(0, dtype=np.int64)] * columns,
        lengths=np.zeros((1 + len(layout.lists), 0), dtype=np.int32),
        dense=np.zeros((0, len(layout.schema.dense)), dtype=np.float32),
        floats=np.zeros((2, 0), dtype=np.float32),
        integers=np.zeros((2, 0), dtype=np.int64),
    )


def _singles(table: pa.Table, layout: ColumnLayout, errors: RowErrors) -> np.ndarray:
    """Return ``(S, N)``; ids outside their table come out as anything, and their rows are bad."""
    singles_SN = np.empty((len(layout.singles), table.num_rows), dtype=layout.single_type)
    for index, (name, of_table) in enumerate(layout.singles.items()):
        singles_SN[index] = single_ids(table, name, layout.schema.tables[of_table], errors)
    return singles_SN


def _parallel(
    table: pa.Table, lists: ParallelLists, tables: Mapping[str, int], errors: RowErrors
) -> list[Ragged]:
    columns = {
        name: many_ids(table, name, tables[of_table], errors)
        for name, of_table in lists.ids.items()
    }
    if lists.time is not None:
        columns[lists.time] = many_integers(table, lists.time, errors)
    if lists.group is not None:
        check_parallel(lists.group, columns, errors)
    return [columns[name] for name in lists.columns]
