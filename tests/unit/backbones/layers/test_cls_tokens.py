"""CLS tokens before the events, against loops over rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe.backbones.layers.attention import rotation_of
from torchrec_hilomoe.backbones.layers.cls_tokens import places_of, prepend, TokenCounts

WIDTH = 4
LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def test_rows_are_their_cls_tokens_then_their_events(lengths, cls, recent, more):
    counts = TokenCounts(context=1, cls=cls, pooled=0, recent=recent)
    events, tokens = torch.randn(sum(lengths), WIDTH), torch.randn(len(lengths), cls, WIDTH)
    sizes = [cls + length for length in lengths]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    max_seqlen = max(lengths) + more
    places = places_of(offsets, events, max_seqlen, counts, WIDTH)
    rows = [torch.cat(pair) for pair in zip(tokens, events.split(lengths), strict=True)]
    values = prepend(tokens, events, places)
    assert torch.equal(values, torch.cat(rows))
    assert torch.equal(places.offsets, offsets)
    assert places.max_seqlen == max_seqlen + cls

    for row, length in enumerate(lengths):
        at = places.ends[row]
        assert torch.equal(values[at[:cls]], tokens[row])
        latest = rows[row][cls:].flip(0)[:recent]
        assert torch.equal(values[at[cls : cls + len(latest)]], latest)
        exists = [True] * cls + [ago < length for ago in range(recent)]
        assert places.exists[row, :, 0].tolist() == exists

    positions = torch.cat([torch.arange(size) for size in sizes])
    want = rotation_of(positions, WIDTH, torch.float32)
    assert torch.equal(places.rotation.cosines, want.cosines)
    assert torch.equal(places.rotation.sines, want.sines)


def test_a_batch_without_rows():
    counts = TokenCounts(context=1, cls=2, pooled=0, recent=1)
    events = torch.randn(0, WIDTH)
    places = places_of(torch.zeros(1, dtype=torch.int64), events, 1, counts, WIDTH)
    assert prepend(torch.randn(0, 2, WIDTH), events, places).shape == (0, WIDTH)
    assert places.ends.shape == (0, 3)


def test_counts_add_up():
    assert TokenCounts(context=9, cls=4, pooled=2, recent=1).summary == 7
