"""Cutting and reordering list columns against the slow definition: one row at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_hilomoe.data.ragged import cut_alike, Ragged

# Among them what a float of the same width would be: no number, a signalling one, minus nothing.
BITS = [-1, 0, 0x7F800001, -0x80000000, 0x7FF0000000000001, -(2**63), 2**63 - 1]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=9),
    st.lists(st.sampled_from(["i2", "i4", "i8"]), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from(["first", "last"]),
    st.data(),
)
def test_every_column_keeps_the_same_entries_to_the_bit(lengths, kinds, max_length, keep, data):
    rows, entries = len(lengths), sum(lengths)
    offsets = np.cumsum([0, *lengths])
    bits = st.lists(st.sampled_from(BITS), min_size=entries, max_size=entries)
    stored = [np.array(data.draw(bits), dtype=np.int64).astype(kind) for kind in kinds]
    order = data.draw(st.none() | st.permutations(range(rows)))
    bad = data.draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
    cut = cut_alike(
        [Ragged(values=values, offsets=offsets) for values in stored],
        order_N=None if order is None else np.array(order, dtype=np.int64),
        bad_N=None if bad is None else np.array(bad, dtype=bool),
        max_length=max_length,
        keep=keep,
    )
    for values, got in zip(stored, cut.values, strict=True):
        want = []
        for row in range(rows) if order is None else order:
            entry = values[offsets[row] : offsets[row + 1]]
            entry = entry[-max_length:] if keep == "last" else entry[:max_length]
            want.append([] if bad is not None and bad[row] else entry.tolist())
        assert got.tolist() == [value for entry in want for value in entry]
        assert cut.lengths.tolist() == [len(entry) for entry in want]
    assert cut.offsets.tolist() == np.cumsum([0, *cut.lengths]).tolist()
    assert cut.lengths.dtype == np.int32


def test_columns_may_differ_in_bad_rows():
    columns = [
        Ragged(values=np.arange(5), offsets=np.array([0, 1, 3, 5])),
        Ragged(values=np.arange(10, 14), offsets=np.array([0, 1, 2, 4])),
    ]
    bad = np.array([False, True, False])
    cut = cut_alike(columns, order_N=np.array([2, 1, 0]), bad_N=bad, max_length=9, keep="last")
    assert [values.tolist() for values in cut.values] == [[3, 4, 0], [12, 13, 10]]
    assert cut.lengths.tolist() == [2, 0, 1]
