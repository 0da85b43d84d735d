"""Values to ids against a dictionary."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe.data.prepare.encoding import encoder_of, Hashed, Ids, Numbers

NUMBERS = st.integers(-(1 << 40), 1 << 40) | st.integers(0, 50)


def by_dictionary(vocabulary: list, values: list, unknown: int) -> list[int]:
    ids = {value: place for place, value in enumerate(vocabulary, start=1)}
    return [ids.get(value, unknown) for value in values]


@given(
    st.lists(NUMBERS, unique=True, max_size=20),
    st.lists(NUMBERS | st.none(), max_size=30),
    st.integers(0, 30),
)
def test_numbers_match_a_dictionary(vocabulary, values, unknown):
    encoder = encoder_of(pl.Series(vocabulary, dtype=pl.Int64), unknown)
    got = encoder.encode(pl.Series(values, dtype=pl.Int64))
    assert got.to_list() == by_dictionary(vocabulary, values, unknown)


@given(
    st.lists(st.text(max_size=3), unique=True, max_size=20),
    st.lists(st.text(max_size=3) | st.none(), max_size=30),
    st.integers(0, 30),
)
def test_texts_match_a_dictionary(vocabulary, values, unknown):
    encoder = encoder_of(pl.Series(vocabulary, dtype=pl.String), unknown)
    got = encoder.encode(pl.Series(values, dtype=pl.String))
    assert got.to_list() == by_dictionary(vocabulary, values, unknown)


@pytest.mark.parametrize("spread", [1, 1 << 30], ids=["dense", "sparse"])
def test_both_ways_to_look_numbers_up_agree(spread):
    rng = np.random.default_rng(0)
    vocabulary = np.unique(rng.integers(0, 5000, size=400)) * spread
    encoder = Numbers(vocabulary, 7)
    values = rng.integers(-10, 5010, size=2000) * spread
    want = by_dictionary(vocabulary.tolist(), values.tolist(), 7)
    assert encoder.encode(pl.Series(values)).to_list() == want


def test_ids_stay_and_hashes_stay_inside():
    assert Ids().encode(pl.Series([3, None, 0])).to_list() == [3, 0, 0]
    assert set(Hashed(9).encode(pl.Series(["a", None, "b"]))) <= set(range(9))
