"""Several histories become one, against loops over rows and steps."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.masknet import MaskNet, steps_of
from torchrec_hilomoe.embeddings.features import History

WIDTHS = (3, 1, 2)


def history(lengths: list[int], width: int) -> History:
    return History(
        events=torch.randn(sum(lengths), width),
        lengths=torch.tensor(lengths),
        target=torch.full((len(lengths), width), torch.nan),  # nobody may read it
    )


@st.composite
def groups(draw: st.DrawFn) -> list[History]:
    rows, count = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    lengths = st.lists(st.integers(0, 4), min_size=rows, max_size=rows)
    return [history(draw(lengths), width) for width in WIDTHS[:count]]


@given(groups())
def test_steps_join_what_is_equally_long_ago(histories):
    steps = steps_of(histories)
    parts = [h.events.split(h.lengths.tolist()) for h in histories]
    want = [torch.empty(0, steps.values.shape[1])]
    for of_row in zip(*parts, strict=True):
        for ago in range(max(len(events) for events in of_row), 0, -1):
            there = [
                events[-ago] if ago <= len(events) else torch.zeros(events.shape[1])
                for events in of_row
            ]
            want.append(torch.cat(there).unsqueeze(0))
    assert torch.equal(steps.values, torch.cat(want))
    lengths = [max(len(events) for events in of_row) for of_row in zip(*parts, strict=True)]
    assert steps.lengths.tolist() == lengths
    assert torch.equal(steps_of(histories, sum(lengths)).values, steps.values)


@given(groups())
def test_every_event_is_in_one_step(histories):
    for h in histories:
        h.events.requires_grad_()
    steps_of(histories).values.sum().backward()
    for h in histories:
        if len(histories) > 1 and h.events.numel():
            assert h.events.grad is not None
            assert torch.equal(h.events.grad, torch.ones_like(h.events))


def test_one_history_is_its_own_steps():
    only = history([2, 0, 1], 3)
    steps = steps_of([only])
    assert steps.values is only.events
    assert steps.lengths is only.lengths


def test_the_mask_weighs_features_by_all_of_the_step():
    net, x = MaskNet(4, 2).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weighed = x * net.mask(x)
    assert_within(net(x), net.compress(weighed), float64_rounding(net, x))
    (grad,) = torch.autograd.grad(net.mask(x)[:, 0].sum(), x)
    assert (grad != 0).all()
