"""Raw columns become typed ones, whole columns at a time; rows that cannot are bad.

Text is taken for what the schema wants of it; typed columns keep their type if it fits.

Shape legend:
    N  rows
    T  entries of a list column, all rows together
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.column_types import is_list
from torchrec_hilomoe.data.prepare.arrow import call

__all__ = ["BadRows", "Lists", "aligned", "numbers", "real_numbers", "token_lists", "tokens"]

NUMBER = "^-?[0-9]{1,18}$"


class BadRows:
    """Which rows of a piece are bad, and the first reason of each.

    Args:
        rows: ``N``.
    """

    def __init__(self, rows: int) -> None:
        self.bad_N = np.zeros(rows, dtype=bool)
        self._reasons: dict[int, str] = {}

    def add(self, bad_N: np.ndarray, reason: str) -> None:
        """Mark rows."""
        for row in np.flatnonzero(bad_N & ~self.bad_N).tolist():
            self._reasons[row] = reason
        self.bad_N |= bad_N

    def reasons(self) -> dict[int, str]:
        """Return each bad row and what is wrong with it."""
        return dict(sorted(self._reasons.items()))


@dataclass(frozen=True, kw_only=True)
class Lists:
    """A list column: row ``n`` has entries ``[offsets[n], offsets[n + 1])``.

    Attributes:
        values: ``(T,)``; a null is missing.
        offsets: ``(N + 1,)`` int64, from 0.
    """

    values: pa.Array
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """``(N,)`` entries of each row."""
        return np.diff(self.offsets)


def tokens(column: pa.ChunkedArray, name: str, bad: BadRows, *, text: bool) -> pa.Array:
    """Return a column of raw ids: int64, or text; a null is a missing one.

    Args:
        column: Of the raw file.
        name: Of the raw column, for reasons.
        bad: Is told of rows that hold something else.
        text: Whether ids are texts.
    """
    array = _whole(column)
    if text:
        return pc.cast(array, pa.large_string())
    found, wrong_N = _integers(array)
    bad.add(wrong_N, f"{name} is no whole number")
    return found


def numbers(column: pa.ChunkedArray, name: str, bad: BadRows) -> np.ndarray:
    """Return a column of whole numbers, int64; a missing one is bad."""
    array = _whole(column)
    if pa.types.is_timestamp(array.type):
        array = pc.cast(pc.cast(array, pa.timestamp("s"), safe=False), pa.int64())
    found, wrong_N = _integers(array)
    bad.add(wrong_N | _mask(found.is_null()), f"{name} is no whole number")
    return pc.fill_null(found, 0).to_numpy(zero_copy_only=False)


def real_numbers(
    column: pa.ChunkedArray, name: str, bad: BadRows, *, missing: float | None = None
) -> np.ndarray:
    """Return a column of numbers, float32.

    Args:
        column: Of the raw file.
        name: Of the raw column, for reasons.
        bad: Is told of rows without a finite number.
        missing: Stands for a null; without it a null is bad.
    """
    array = _whole(column)
    try:
        found = pc.cast(array, pa.float64())
    except pa.ArrowInvalid:
        found = pa.array([_float(value) for value in array.to_pylist()], pa.float64())
    if missing is not None:
        found = call("if_else", array.is_null(), missing, found)
    with np.errstate(over="ignore"):
        values_N = pc.fill_null(found, np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
    bad.add(~np.isfinite(values_N), f"{name} is no finite number")
    return np.nan_to_num(values_N, nan=0.0, posinf=0.0, neginf=0.0)


def token_lists(
    column: pa.ChunkedArray, name: str, bad: BadRows, *, text: bool, separator: str
) -> Lists:
    """Return a column of lists of raw ids; a null is an empty list.

    Args:
        column: Lists, or texts of joined ids.
        name: Of the raw column, for reasons.
        bad: Is told of rows with an entry that is no id.
        text: Whether ids are texts.
        separator: Between joined ids.
    """
    array = _whole(column)
    if not is_list(array.type):
        joined = pc.cast(array, pa.large_string())
        joined = call("if_else", call("equal", joined, ""), None, joined)
        array = call("split_pattern", joined, options=pc.SplitPatternOptions(separator))
    array = pc.cast(array, pa.large_list(array.type.value_type))
    # Null rows may stand over entries, and slices over those of others.
    lengths_N = pc.fill_null(call("list_value_length", array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    flat = call("list_flatten", array)
    if text:
        found = pc.cast(flat, pa.large_string())
        wrong_T = _mask(pc.fill_null(call("equal", found, ""), True))
        found = pc.fill_null(found, "")
    else:
        found, wrong_T = _integers(flat)
        wrong_T |= _mask(found.is_null())
        found = pc.fill_null(found, 0)
    if wrong_T.any():
        before = np.concatenate([[0], np.cumsum(wrong_T)])
        wrong_N = before[offsets[1:]] > before[offsets[:-1]]
        bad.add(wrong_N, f"{name} has an entry that is no {'text' if text else 'whole number'}")
    return Lists(values=found, offsets=offsets)


def aligned(columns: Sequence[Lists]) -> list[Lists]:
    """Return lists of equal lengths: last entries stand together, what lacks is missing in front.

    Example:
        >>> short, _ = aligned(
        ...     [
        ...         Lists(values=pa.array([7]), offsets=np.array([0, 1])),
        ...         Lists(values=pa.array([1, 2]), offsets=np.array([0, 2])),
        ...     ]
        ... )
        >>> short.values.to_pylist()
        [None, 7]
    """
    longest_N = np.maximum.reduce([column.lengths for column in columns])
    offsets = np.concatenate([[0], np.cumsum(longest_N)])
    row_T = np.repeat(np.arange(len(longest_N)), longest_N)
    from_end_T = offsets[1:][row_T] - np.arange(offsets[-1])
    found = []
    for column in columns:
        if np.array_equal(column.lengths, longest_N):
            found.append(column)
            continue
        there_T = from_end_T <= column.lengths[row_T]
        index_T = pa.array(column.offsets[1:][row_T] - from_end_T, mask=~there_T)
        found.append(Lists(values=column.values.take(index_T), offsets=offsets))
    return found


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column without a row has no chunk to combine
        array = pa.array([], column.type)
    return pc.cast(array, array.type.value_type) if pa.types.is_dictionary(array.type) else array


def _integers(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return int64, with nulls where there is none, and which entries are something else."""
    try:
        return pc.cast(array, pa.int64()), np.zeros(len(array), dtype=bool)
    except pa.ArrowInvalid:
        pass
    if pa.types.is_floating(array.type):
        # Beyond 2 ** 53 a float no longer tells one whole number from the next.
        fits = call("less", call("abs", array), 2.0**53)
        fits = call("and", fits, call("equal", array, call("floor", array)))
        fits = pc.fill_null(fits, False)
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        fits = pc.fill_null(
            call("match_substring_regex", array, options=pc.MatchSubstringOptions(NUMBER)), False
        )
    else:
        return pa.nulls(len(array), pa.int64()), _mask(array.is_valid())
    wrong_N = _mask(call("and_not", array.is_valid(), fits))
    return pc.cast(call("if_else", fits, array, None), pa.int64()), wrong_N


def _float(value: object) -> float:
    try:
        return float(str(value)) if value is not None else float("nan")
    except ValueError:
        return float("nan")


def _mask(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)
