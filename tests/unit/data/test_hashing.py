"""The hash: the same for a number as for its text, spread evenly, and fixed for ever."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe.data.hashing import hash64, hash_ids, mix64

MASK = (1 << 64) - 1


def by_definition(text: str) -> int:
    """One byte at a time, in Python's own integers."""
    base, power, total = 0x9E3779B97F4A7C15, 1, 0
    for byte in text.encode():
        power = power * base & MASK
        total = (total + (byte + 1) * power) & MASK
    mixed = (total + 0x9E3779B97F4A7C15) & MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
    return mixed ^ mixed >> 31


@given(st.lists(st.text(max_size=20)), st.integers(0, 3))
def test_matches_the_definition_also_of_slices(texts, skipped):
    array = pa.array(texts, pa.string()).slice(skipped)
    assert hash64(array).tolist() == [by_definition(text) for text in texts[skipped:]]


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_a_number_hashes_as_its_text(numbers):
    as_text = hash64(pa.array([str(number) for number in numbers], pa.string()))
    assert hash64(pa.array(numbers, pa.int64())).tolist() == as_text.tolist()


def test_neighbours_do_not_meet_and_fill_rows_evenly():
    numbers = pa.array(range(200_000))
    assert len(np.unique(hash64(numbers))) == 200_000
    counts = np.bincount(hash_ids(numbers, 101), minlength=101)
    assert counts[0] == 0  # padding
    # Each of 100 rows gets about 2,000, with a standard deviation of about 45.
    assert abs(counts[1:] - 2000).max() < 6 * 45


def test_nulls_are_padding_and_a_tiny_table_still_works():
    assert hash_ids(pa.array(["a", None]), 5)[1] == 0
    assert hash_ids(pa.array(["a", None]), 2).tolist() == [1, 0]


def test_mixing_is_one_to_one_on_a_range():
    assert len(np.unique(mix64(np.arange(100_000)))) == 100_000
