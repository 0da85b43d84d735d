"""A 64-bit hash of raw values, the same on every machine and for a number as for its text.

Python's own hash differs from process to process. This one is a polynomial over the UTF-8 bytes,
whole columns at a time, whose bits are then mixed.

Shape legend:
    N  values
    T  bytes of all values together
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["hash64", "hash_ids", "mix64"]

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no byte is multiplied away


def hash_ids(values: pa.Array, rows: int) -> np.ndarray:
    """Return a row from 1 to ``rows - 1`` for each value, int64; a null has row 0.

    Example:
        >>> hash_ids(pa.array(["red", None, "red"]), 10).tolist()
        [9, 0, 9]
    """
    ids_N = 1 + (hash64(values) % np.uint64(max(rows - 1, 1))).astype(np.int64)
    ids_N[values.is_null().to_numpy(zero_copy_only=False)] = 0
    return ids_N


def hash64(values: pa.Array) -> np.ndarray:
    """Return the hash of each value's text, uint64; nulls hash as the empty text."""
    text = pc.fill_null(pc.cast(values, pa.large_string()), "")
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    starts_N, lengths_N = offsets[:-1] - offsets[:1], np.diff(offsets)
    if not len(lengths_N) or not lengths_N.any():
        return mix64(np.zeros(len(lengths_N), dtype=np.uint64))
    data_T = np.frombuffer(text.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    place_T = np.arange(len(data_T)) - np.repeat(starts_N, lengths_N)
    with np.errstate(over="ignore"):
        powers = np.multiply.accumulate(np.full(lengths_N.max(), BASE))
        terms_T = (data_T.astype(np.uint64) + np.uint64(1)) * powers[place_T]
        sums_N = np.zeros(len(lengths_N), dtype=np.uint64)
        some_N = lengths_N > 0
        sums_N[some_N] = np.add.reduceat(terms_T, starts_N[some_N])
        return mix64(sums_N)


def mix64(numbers_N: np.ndarray) -> np.ndarray:
    """Spread the bits of 64-bit integers, one to one (the finish of splitmix64)."""
    with np.errstate(over="ignore"):
        mixed_N = numbers_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed_N ^ (mixed_N >> np.uint64(31))
