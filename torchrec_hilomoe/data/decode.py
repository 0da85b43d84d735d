"""A block becomes buffers that a batch can be sliced from: checked, cut and in epoch order.

Everything that can be done once a block is done here, so that a batch costs slices only. A bad
row stays in its place, with weight 0 and nothing in it: who reads which row is arithmetic on
row counts, which a removed row would upset.

Shape legend:
    N  rows of the block
    V  ids of a column, all rows together
    F  dense features
    K  keys of the pooled or of the unpooled features
"""

from collections.abc import Mapping
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import pyarrow as pa
import torch

from torchrec_hilomoe.data.columns import (
    check_parallel,
    dense_column,
    Faults,
    flat_column,
    id_column,
    label_column,
    Ragged,
    times_column,
    weight_column,
)
from torchrec_hilomoe.data.schema import Schema

__all__ = ["DecodedBlock", "IdColumns", "decode_block", "padding_block"]


@dataclass(frozen=True, kw_only=True)
class IdColumns:
    """The columns of one jagged tensor, one entry a key.

    Attributes:
        values: ``(V,)`` of each key, of any integer type.
        offsets: ``(N + 1,)`` int64 of each key: where a row's ids begin in ``values``.
        lengths: ``(K, N)`` int32.
    """

    values: tuple[np.ndarray, ...]
    offsets: tuple[np.ndarray, ...]
    lengths: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DecodedBlock:
    """A block, checked, cut to the schema's lengths and in the epoch's order.

    Attributes:
        pooled: The columns of ``Schema.pooled_keys``.
        unpooled: The columns of ``Schema.unpooled_keys``.
        dense: ``(N, F)`` float32.
        labels: ``(N,)`` float32.
        weights: ``(N,)`` float32: 0 for a bad row, else what the schema's weight says, or 1.
        groups: ``(N,)`` int64.
        time: ``(N,)`` int64, of zeros if the schema names no time.
        times: The events' times of each group that has them, cut like its ids.
        bad: Place in this order to a description: the stored row's number and its faults.
    """

    pooled: IdColumns
    unpooled: IdColumns
    dense: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: np.ndarray
    time: np.ndarray
    times: tuple[Ragged, ...]
    bad: Mapping[int, str]


def decode_block(table: pa.Table, schema: Schema, order_N: np.ndarray) -> DecodedBlock:
    """Check, cut and reorder a block.

    Args:
        table: Columns that ``column_types.check_columns`` accepts.
        schema: What they mean.
        order_N: The stored row at each place of the result.

    Returns:
        The block, in that order.
    """
    rows = table.num_rows
    faults = Faults(rows)
    columns = {
        feature.name: id_column(table, feature.name, schema.tables[feature.table], faults)
        for feature in schema.id_features
    }
    for name in schema.event_times:
        columns[name] = times_column(table, name, faults)
    for group in schema.sequences:
        check_parallel(group, columns, faults)
    dense_NF = np.empty((rows, len(schema.dense)), dtype=np.float32)
    for index, name in enumerate(schema.dense):
        dense_NF[:, index] = dense_column(table, name, faults)
    labels_N = label_column(table, schema.label, faults)
    groups_N = flat_column(table, schema.group, faults).astype(np.int64)
    weights_N = np.ones(rows, dtype=np.float32)
    if schema.weight is not None:
        weights_N = weight_column(table, schema.weight, faults)
    time_N = np.zeros(rows, dtype=np.int64)
    if schema.time is not None:
        time_N = flat_column(table, schema.time, faults).astype(np.int64)

    cutter = _Cutter(columns, faults.bad_N, order_N)
    ordered_bad_N = faults.bad_N[order_N]
    dense_NF, labels_N, groups_N = dense_NF[order_N], labels_N[order_N], groups_N[order_N]
    weights_N, time_N = weights_N[order_N], time_N[order_N]
    for array in (dense_NF, labels_N, groups_N, weights_N, time_N):
        array[ordered_bad_N] = 0
    return DecodedBlock(
        pooled=_pooled(schema, cutter),
        unpooled=_unpooled(schema, cutter),
        dense=dense_NF,
        labels=labels_N,
        weights=weights_N,
        groups=groups_N,
        time=time_N,
        times=_times(schema, cutter),
        bad={int(at): faults.of(int(order_N[at])) for at in np.flatnonzero(ordered_bad_N)},
    )


def padding_block(schema: Schema) -> DecodedBlock:
    """Return one row of weight 0, with the padding id wherever a row must have an id."""

    def column(single: bool) -> Ragged:
        return Ragged(values=np.zeros(int(single), np.int64), offsets=np.array([0, int(single)]))

    columns = {field.name: column(True) for field in schema.candidate}
    columns |= {field.name: column(False) for field in schema.sequence_fields}
    columns |= {name: column(False) for name in schema.event_times}
    columns |= {feature.name: column(feature.max_length == 1) for feature in schema.pooled}
    cutter = _Cutter(columns, np.zeros(1, dtype=bool), np.zeros(1, dtype=np.int64))
    return DecodedBlock(
        pooled=_pooled(schema, cutter),
        unpooled=_unpooled(schema, cutter),
        dense=np.zeros((1, len(schema.dense)), dtype=np.float32),
        labels=np.zeros(1, dtype=np.float32),
        weights=np.zeros(1, dtype=np.float32),
        groups=np.zeros(1, dtype=np.int64),
        time=np.zeros(1, dtype=np.int64),
        times=_times(schema, cutter),
        bad={},
    )


class _Cutter:
    """Takes the ids that are kept of each column, in the epoch's order.

    Args:
        columns: What is stored, by name.
        bad_N: Rows that keep nothing.
        order_N: The stored row at each place.
    """

    def __init__(
        self, columns: Mapping[str, Ragged], bad_N: np.ndarray, order_N: np.ndarray
    ) -> None:
        self._columns = columns
        self._bad_N = bad_N
        self._order_N = order_N
        self.rows = len(order_N)

    def single(self, name: str) -> Ragged:
        """Take a column of one id a row; a bad row gets the padding id."""
        values_N = self._columns[name].values[self._order_N]
        values_N[self._bad_N[self._order_N]] = 0
        return Ragged(values=values_N, offsets=np.arange(self.rows + 1))

    def many(self, name: str, max_length: int, keep: str) -> Ragged:
        """Take a column of many ids a row, cut to ``max_length``; a bad row gets none.

        A row is seen as two segments, of which one is kept. FBGEMM copies the kept segments
        into their order by blocks of memory, several times faster than numpy by ids.
        """
        column = self._columns[name]
        stored_N = np.diff(column.offsets)
        kept_N = np.minimum(stored_N, max_length)
        kept_N[self._bad_N] = 0
        last = int(keep == "last")
        lengths_N2 = np.empty((self.rows, 2), dtype=np.int32)
        lengths_N2[:, last] = kept_N
        lengths_N2[:, 1 - last] = stored_N - kept_N
        values = column.values
        if values.dtype not in (np.int32, np.int64):
            values = values.astype(np.int64)
        lengths_N, taken, _ = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy((2 * self._order_N + last).astype(np.int32)),
            torch.from_numpy(lengths_N2.reshape(-1)),
            torch.from_numpy(values),
            None,
            int(kept_N.sum()),
        )
        offsets = np.concatenate([[0], np.cumsum(lengths_N.numpy())])
        return Ragged(values=taken.numpy(), offsets=offsets)


def _id_columns(cuts: list[Ragged], rows: int) -> IdColumns:
    lengths_KN = np.empty((len(cuts), rows), dtype=np.int32)
    for lengths_N, cut in zip(lengths_KN, cuts, strict=True):
        lengths_N[:] = np.diff(cut.offsets)
    return IdColumns(
        values=tuple(cut.values for cut in cuts),
        offsets=tuple(cut.offsets for cut in cuts),
        lengths=lengths_KN,
    )


def _pooled(schema: Schema, cutter: _Cutter) -> IdColumns:
    cuts = [
        cutter.single(feature.name)
        if feature.max_length == 1
        else cutter.many(feature.name, feature.max_length, "last")
        for feature in schema.pooled
    ]
    return _id_columns(cuts, cutter.rows)


def _unpooled(schema: Schema, cutter: _Cutter) -> IdColumns:
    cuts = [cutter.single(field.name) for field in schema.candidate]
    for group in schema.sequences:
        cuts += [cutter.many(field.name, group.max_length, group.keep) for field in group.fields]
    return _id_columns(cuts, cutter.rows)


def _times(schema: Schema, cutter: _Cutter) -> tuple[Ragged, ...]:
    return tuple(
        cutter.many(group.time, group.max_length, group.keep)
        for group in schema.sequences
        if group.time is not None
    )
