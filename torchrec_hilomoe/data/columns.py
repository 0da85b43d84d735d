"""Arrow columns become numpy arrays, and their bad rows become known.

No step loops over rows, except to describe bad ones.

Shape legend:
    N  rows of the block
    V  ids of a column, all rows together
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from torchrec_hilomoe.data.column_types import is_list
from torchrec_hilomoe.data.schema import SequenceGroup

__all__ = [
    "Faults",
    "Ragged",
    "check_parallel",
    "dense_column",
    "flat_column",
    "id_column",
    "label_column",
    "times_column",
    "weight_column",
]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A column of ids as stored: row ``n`` is ``values[offsets[n]:offsets[n + 1]]``.

    Attributes:
        values: ``(V,)``, of any integer type; the memory may be Arrow's, so nobody writes to it.
        offsets: ``(N + 1,)`` int64, from 0.
    """

    values: np.ndarray
    offsets: np.ndarray


class Faults:
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
        faults = [describe(row) for bad_N, describe in self._found if bad_N[row]]
        # A column that is an id and the group, say, is looked at twice.
        return f"row {row}: {'; '.join(dict.fromkeys(faults))}"


def id_column(table: pa.Table, name: str, table_rows: int, faults: Faults) -> Ragged:
    """Return a column of ids, one or many a row; nulls and ids outside the table are bad."""
    column = _stored(table, name, faults)
    values, offsets = column.values, column.offsets
    # Seen as unsigned, a negative id is a huge one: one pass finds both.
    if len(values) and values.view(f"u{values.itemsize}").max() >= table_rows:
        wrong_V = (values < 0) | (values >= table_rows)

        def describe(row: int) -> str:
            mine = slice(offsets[row], offsets[row + 1])
            first = values[mine][wrong_V[mine]][0]
            return f"{name} has id {first}, outside its table's 0 to {table_rows - 1}"

        faults.add(_rows_with(wrong_V, offsets), describe)
    return column


def times_column(table: pa.Table, name: str, faults: Faults) -> Ragged:
    """Return a column of whole seconds, many a row; nulls are bad."""
    return _stored(table, name, faults)


def _stored(table: pa.Table, name: str, faults: Faults) -> Ragged:
    """Return a column of integers, one or many a row; nulls are bad."""
    array = table.column(name).combine_chunks()
    many = is_list(array.type)
    if many:
        offsets = array.offsets.to_numpy().astype(np.int64)
        base, end = int(offsets[0]), int(offsets[-1])
        flat, offsets = array.values.slice(base, end - base), offsets - base
        if array.null_count:
            faults.add(_mask(array.is_null()), lambda row: f"{name} is null")
    else:
        flat, offsets = array, np.arange(len(array) + 1)
    if flat.null_count:
        null_N = _rows_with(_mask(flat.is_null()), offsets)
        faults.add(null_N, lambda row: f"{name} {'has a null id' if many else 'is null'}")
        flat = pc.fill_null(flat, 0)
    # Arrow's own numpy view is read-only, which PyTorch warns of; nothing here writes to it.
    return Ragged(values=torch.from_dlpack(flat).numpy(), offsets=offsets)


def flat_column(table: pa.Table, name: str, faults: Faults) -> np.ndarray:
    """Return a column of numbers; nulls become 0 and are bad."""
    array = table.column(name).combine_chunks()
    if array.null_count:
        faults.add(_mask(array.is_null()), lambda row: f"{name} is null")
        array = pc.fill_null(array, pa.scalar(0).cast(array.type))
    return array.to_numpy(zero_copy_only=False)


def dense_column(table: pa.Table, name: str, faults: Faults) -> np.ndarray:
    """Return a float column; what is not finite as float32 is bad."""
    with np.errstate(over="ignore"):
        values_N = flat_column(table, name, faults).astype(np.float32)
    faults.add(~np.isfinite(values_N), lambda row: f"{name} is {values_N[row]}")
    return values_N


def label_column(table: pa.Table, name: str, faults: Faults) -> np.ndarray:
    """Return the labels as float32; what is neither 0 nor 1 is bad."""
    stored_N = flat_column(table, name, faults)
    wrong_N = (stored_N != 0) & (stored_N != 1)
    faults.add(wrong_N, lambda row: f"{name} is {stored_N[row]}, not 0 or 1")
    return (stored_N == 1).astype(np.float32)


def weight_column(table: pa.Table, name: str, faults: Faults) -> np.ndarray:
    """Return the rows' weights as float32; what is negative or not finite is bad."""
    weights_N = dense_column(table, name, faults)
    faults.add(weights_N < 0, lambda row: f"{name} is {weights_N[row]}, which is below 0")
    return weights_N


def check_parallel(group: SequenceGroup, columns: Mapping[str, Ragged], faults: Faults) -> None:
    """Mark rows whose fields of one sequence group have different numbers of events."""
    names = [field.name for field in group.fields] + ([group.time] if group.time else [])
    counts = {name: np.diff(columns[name].offsets) for name in names}
    first_N, *others = counts.values()
    unequal_N = np.zeros(len(first_N), dtype=bool)
    for count_N in others:
        unequal_N |= count_N != first_N

    def describe(row: int) -> str:
        lengths = ", ".join(f"{name} {count_N[row]}" for name, count_N in counts.items())
        return f"the fields of sequence group {group.name!r} have unequal lengths ({lengths})"

    faults.add(unequal_N, describe)


def _mask(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _rows_with(wrong_V: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return which rows have a marked entry."""
    before = np.concatenate([[0], np.cumsum(wrong_V)])
    return before[offsets[1:]] > before[offsets[:-1]]
