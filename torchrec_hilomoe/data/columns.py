"""Arrow columns become numpy arrays, and their bad rows become known.

No step loops over rows, except to describe bad ones.

Shape legend:
    N  rows of the block
    V  ids of a column, all rows together
    F  dense features
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from torchrec_hilomoe.data.ragged import Ragged
from torchrec_hilomoe.data.schema import SequenceGroup

__all__ = [
    "RowErrors",
    "check_parallel",
    "dense_columns",
    "flat_column",
    "label_column",
    "many_ids",
    "many_integers",
    "single_ids",
    "weight_column",
]


class RowErrors:
    """Which rows of a block are bad, and why.

    Args:
        rows: ``N``.
    """

    def __init__(self, rows: int) -> None:
        self.bad_N = np.zeros(rows, dtype=bool)
        self._found: list[tuple[np.ndarray, Callable[[int], str]]] = []

    def add(self, bad_N: np.ndarray, describe: Callable[[int], str]) -> None:
        """Mark rows; ``describe`` tells a marked row's fault when somebody asks."""
        if bad_N.any():
            self.bad_N |= bad_N
            self._found.append((bad_N, describe))

    def of(self, row: int) -> str:
        """Describe every fault of a row."""
        errors = [describe(row) for bad_N, describe in self._found if bad_N[row]]
        # A column that is an id and the group, say, is looked at twice.
        return f"row {row}: {'; '.join(dict.fromkeys(errors))}"


def single_ids(table: pa.Table, name: str, table_rows: int, errors: RowErrors) -> np.ndarray:
    """Return a column of one id a row; nulls and ids outside the table are bad."""
    array = _whole(table, name)
    values_N = _integers(_without_nulls(array, errors, lambda row: f"{name} is null"))
    if _any_outside(values_N, table_rows):
        wrong_N = (values_N < 0) | (values_N >= table_rows)
        errors.add(wrong_N, lambda row: _outside(name, values_N[row], table_rows))
    return values_N


def many_ids(table: pa.Table, name: str, table_rows: int, errors: RowErrors) -> Ragged:
    """Return a column of many ids a row; nulls and ids outside the table are bad."""
    column = many_integers(table, name, errors)
    values, offsets = column.values, column.offsets
    if _any_outside(values, table_rows):
        wrong_V = (values < 0) | (values >= table_rows)

        def describe(row: int) -> str:
            mine = slice(offsets[row], offsets[row + 1])
            return _outside(name, values[mine][wrong_V[mine]][0], table_rows)

        errors.add(_rows_with(wrong_V, offsets), describe)
    return Ragged(values=_narrow(values, table_rows), offsets=offsets)


def many_integers(table: pa.Table, name: str, errors: RowErrors) -> Ragged:
    """Return a column of many integers a row; nulls are bad."""
    array = _whole(table, name)
    offsets = array.offsets.to_numpy()
    flat = array.values
    if len(flat) != offsets[-1] or offsets[0]:
        flat = flat.slice(offsets[0], offsets[-1] - offsets[0])
        offsets = offsets - offsets[0]
    if array.null_count:
        errors.add(_mask(array.is_null()), lambda row: f"{name} is null")
    if flat.null_count:
        null_N = _rows_with(_mask(flat.is_null()), offsets)
        errors.add(null_N, lambda row: f"{name} has a null id")
        flat = pc.fill_null(flat, 0)
    return Ragged(values=_integers(flat), offsets=offsets)


def flat_column(table: pa.Table, name: str, errors: RowErrors) -> np.ndarray:
    """Return a column of numbers; nulls become 0 and are bad."""
    array = _whole(table, name)
    array = _without_nulls(array, errors, lambda row: f"{name} is null")
    return array.to_numpy(zero_copy_only=False)


def dense_columns(table: pa.Table, names: Sequence[str], errors: RowErrors) -> np.ndarray:
    """Return float columns as ``(F, N)``; what is not finite as float32 is bad."""
    dense_FN = np.empty((len(names), table.num_rows), dtype=np.float32)
    with np.errstate(over="ignore"):
        for index, name in enumerate(names):
            dense_FN[index] = flat_column(table, name, errors)
    if not np.isfinite(dense_FN).all():
        for dense_N, name in zip(dense_FN, names, strict=True):
            _check_finite(dense_N, name, errors)
    return dense_FN


def label_column(table: pa.Table, name: str, errors: RowErrors) -> np.ndarray:
    """Return the labels as float32; what is neither 0 nor 1 is bad."""
    stored_N = flat_column(table, name, errors)
    wrong_N = (stored_N != 0) & (stored_N != 1)
    errors.add(wrong_N, lambda row: f"{name} is {stored_N[row]}, not 0 or 1")
    return (stored_N == 1).astype(np.float32)


def weight_column(table: pa.Table, name: str, errors: RowErrors) -> np.ndarray:
    """Return the rows' weights as float32; what is negative or not finite is bad."""
    with np.errstate(over="ignore"):
        weights_N = flat_column(table, name, errors).astype(np.float32)
    _check_finite(weights_N, name, errors)
    errors.add(weights_N < 0, lambda row: f"{name} is {weights_N[row]}, which is below 0")
    return weights_N


def check_parallel(group: SequenceGroup, columns: Mapping[str, Ragged], errors: RowErrors) -> None:
    """Mark rows whose fields of one sequence group have different numbers of events."""
    names = [field.name for field in group.fields] + ([group.time] if group.time else [])
    first, *others = (columns[name].offsets for name in names)
    if all(np.array_equal(first, offsets) for offsets in others):
        return
    counts = {name: np.diff(columns[name].offsets) for name in names}
    first_N, *others = counts.values()
    unequal_N = np.zeros(len(first_N), dtype=bool)
    for count_N in others:
        unequal_N |= count_N != first_N

    def describe(row: int) -> str:
        lengths = ", ".join(f"{name} {count_N[row]}" for name, count_N in counts.items())
        return f"the fields of sequence group {group.name!r} have unequal lengths ({lengths})"

    errors.add(unequal_N, describe)


def _whole(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    # Even of a single chunk, combine_chunks() makes a copy.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _without_nulls(array: pa.Array, errors: RowErrors, describe: Callable[[int], str]) -> pa.Array:
    if not array.null_count:
        return array
    errors.add(_mask(array.is_null()), describe)
    return pc.fill_null(array, pa.scalar(0).cast(array.type))


def _integers(array: pa.Array) -> np.ndarray:
    # Arrow's own numpy view is read-only, which PyTorch warns of; nothing here writes to it.
    return torch.from_dlpack(array).numpy()


def _narrow(values: np.ndarray, table_rows: int) -> np.ndarray:
    """Halve what is moved about where ids are stored wider than their table wants.

    Ids outside the table come out as anything; their rows are bad and keep none.
    """
    return values.astype(np.int32) if values.itemsize > 4 and table_rows <= 2**31 else values


def _any_outside(values: np.ndarray, table_rows: int) -> bool:
    # Seen as unsigned, a negative id is a huge one: one pass finds both.
    return bool(len(values) and values.view(f"u{values.itemsize}").max() >= table_rows)


def _outside(name: str, id_: int, table_rows: int) -> str:
    return f"{name} has id {id_}, outside its table's 0 to {table_rows - 1}"


def _check_finite(values_N: np.ndarray, name: str, errors: RowErrors) -> None:
    errors.add(~np.isfinite(values_N), lambda row: f"{name} is {values_N[row]}")


def _mask(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _rows_with(wrong_V: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return which rows have a marked entry."""
    before = np.concatenate([[0], np.cumsum(wrong_V)])
    return before[offsets[1:]] > before[offsets[:-1]]
