"""Vocabularies: dense ids by frequency, 0 for what is unknown."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe.data.prepare.vocabulary import Vocabulary

VALUES = st.lists(st.integers(-3, 9)) | st.lists(st.text("abc", max_size=2))


@given(VALUES, VALUES, st.integers(1, 3))
def test_matches_counting_by_hand(raw, asked, min_count):
    if any(type(value) is not type((raw or asked)[0]) for value in asked):
        asked = raw
    kind = str if any(isinstance(value, str) for value in (*raw, *asked)) else int
    counts = Counter(raw)
    known = sorted(
        (value for value in counts if counts[value] >= min_count),
        key=lambda value: (-counts[value], value),
    )
    vocabulary = Vocabulary.count(np.array(raw, dtype=kind), min_count=min_count)
    assert vocabulary.size == len(known) + 1
    ids = vocabulary.encode(np.array(asked, dtype=kind))
    assert ids.dtype == np.int32
    assert ids.tolist() == [known.index(v) + 1 if v in known else 0 for v in asked]


@pytest.mark.parametrize("asked", [[], [1, 2]])
def test_an_empty_vocabulary_knows_nothing(asked):
    vocabulary = Vocabulary.count(np.array([], dtype=int))
    assert vocabulary.size == 1
    assert vocabulary.encode(np.array(asked, dtype=int)).tolist() == [0] * len(asked)
