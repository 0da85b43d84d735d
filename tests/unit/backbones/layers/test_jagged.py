"""Between jagged rows and padded tensors, against loops over rows."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.jagged import (
    layout_of,
    max_rows,
    mean_rows,
    pad,
    tokens_of,
    unpad,
    valid,
)
from torchrec_hilomoe.embeddings.features import History

WIDTH = 3
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def history(lengths: list[int]) -> History:
    return History(
        events=torch.randn(sum(lengths), WIDTH),
        lengths=torch.tensor(lengths),
        target=torch.randn(len(lengths), WIDTH),
    )


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])


@given(LENGTHS, st.integers(0, 3))
def test_tokens_are_each_rows_target_then_its_events(lengths, more):
    rows = history(lengths)
    tokens = tokens_of(rows, max_seqlen=max(lengths) + more)
    want = []
    for target, events in zip(rows.target, rows.events.split(lengths), strict=True):
        want += [target, *events]
    assert torch.equal(tokens.values, torch.stack(want))
    assert torch.equal(tokens.offsets, offsets_of([length + 1 for length in lengths]))
    # The target is 0 away from itself, the latest event 1, the oldest the furthest.
    recency = [far for length in lengths for far in (0, *range(length, 0, -1))]
    assert tokens.recency.tolist() == recency
    assert tokens.max_seqlen == max(lengths) + more + 1


@given(LENGTHS, st.integers(0, 3))
def test_padding_adds_zeros_after_each_row_and_unpadding_removes_them(lengths, more):
    values, max_seqlen = torch.randn(sum(lengths), WIDTH), max(1, max(lengths) + more)
    offsets = offsets_of(lengths)
    padded, mask = pad(values, offsets, max_seqlen), valid(offsets, max_seqlen)
    assert padded.shape == (len(lengths), max_seqlen, WIDTH)
    for row, length in enumerate(lengths):
        assert torch.equal(padded[row, :length], values[offsets[row] : offsets[row + 1]])
        assert not padded[row, length:].any()
        assert mask[row].tolist() == [True] * length + [False] * (max_seqlen - length)
    assert torch.equal(unpad(padded, offsets, sum(lengths)), values)


@given(LENGTHS)
def test_the_mean_is_of_the_events_there_are_and_zero_of_none(lengths):
    plain = history(lengths)
    rows = replace(plain, events=plain.events.double().requires_grad_())
    got = mean_rows(rows)
    nothing = torch.zeros(WIDTH, dtype=torch.float64)
    want = [row.mean(dim=0) if len(row) else nothing for row in rows.events.split(lengths)]
    rounding = float64_rounding(rows.events, got)
    assert_within(got, torch.stack(want), rounding)
    got.sum().backward()
    shares = [1 / length for length in lengths for _ in range(length)]
    assert rows.events.grad is not None
    wanted = torch.tensor(shares, dtype=torch.float64).reshape(-1, 1).expand(-1, WIDTH)
    assert_within(rows.events.grad, wanted, rounding)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_the_maximum_is_each_rows_and_its_gradient_that_of_equal_ones_together(lengths):
    rows = history(lengths)
    layout = layout_of(rows)
    # Of three numbers, so that many are equal; as when a user meets an item twice.
    values = torch.randint(3, (sum(lengths), WIDTH)).double()
    mine, plain = (values.clone().requires_grad_() for _ in range(2))
    got = max_rows(mine, layout.offsets, layout.row)
    want = torch.stack([row.amax(dim=0) for row in plain.split(lengths)])
    assert torch.equal(got, want)
    cotangent = torch.randn(len(lengths), WIDTH).double()
    got.backward(cotangent)
    want.backward(cotangent)
    assert mine.grad is not None
    assert plain.grad is not None
    assert_within(mine.grad, plain.grad, float64_rounding(values, cotangent))
