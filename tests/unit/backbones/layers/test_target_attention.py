"""DIN's attention against loops over rows and events, and what its padding-free layout promises."""

import pytest
import torch
from torch import Tensor

from tests.helpers.rounding import assert_within, float64_rounding, rounded
from torchrec_hilomoe.backbones.layers.jagged import Layout, layout_of
from torchrec_hilomoe.backbones.layers.target_attention import compare, TargetAttention
from torchrec_hilomoe.embeddings.features import History

LENGTHS = (2, 0, 4, 1)
WIDTH = 3


def make_history(dtype: torch.dtype = torch.float64) -> History:
    return History(
        events=torch.randn(sum(LENGTHS), WIDTH, dtype=dtype, requires_grad=True),
        lengths=torch.tensor(LENGTHS),
        target=torch.randn(len(LENGTHS), WIDTH, dtype=dtype, requires_grad=True),
    )


def definition(attention: TargetAttention, history: History) -> Tensor:
    """A row and an event at a time."""
    pooled = []
    for target, events in zip(history.target, history.events.split(LENGTHS), strict=True):
        pairs = [torch.cat([target, h, target - h, target * h]) for h in events]
        scores = torch.stack([attention.mlp(x[None])[0] for x in pairs]) if pairs else events[:, 0]
        weights = scores.softmax(dim=0) if attention.softmax else scores
        pooled.append((weights[:, None] * events).sum(dim=0))
    return torch.stack(pooled)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_matches_the_definition(softmax, activation):
    attention = TargetAttention(WIDTH, (5, 4), activation=activation, softmax=softmax).double()
    history = make_history()
    leaves = [history.events, history.target, *attention.parameters()]
    got = attention(history.target, history.events, layout_of(history))
    want = definition(attention, history)
    assert_within(got, want, float64_rounding(leaves, want))
    assert not got[1].any()  # no event
    cotangent = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, leaves, cotangent)
    want_grads = torch.autograd.grad(want, leaves, cotangent)
    assert_within(got_grads, want_grads, float64_rounding(leaves, want_grads))


def test_weights_are_one_an_event_and_sum_to_one_a_row():
    attention, history = TargetAttention(WIDTH, (5,), softmax=True).double(), make_history()
    weights = attention.weights(history.target, history.events, layout_of(history))
    assert weights.shape == (sum(LENGTHS),)
    sums = [part.sum().item() for part in weights.detach().split(LENGTHS) if len(part)]
    assert sums == rounded([1.0] * 3, terms=2 * max(LENGTHS))  # a quotient by a sum, and a sum


def test_a_softmax_of_huge_scores_does_not_overflow():
    attention, history = TargetAttention(WIDTH, (5,), softmax=True).double(), make_history()
    with torch.no_grad():
        attention.mlp.output.weight.mul_(1e6)
    assert attention(history.target, history.events, layout_of(history)).isfinite().all()


def test_comparing_has_right_gradients():
    history = make_history()
    layout: Layout = layout_of(history)

    def compared(target: Tensor, events: Tensor) -> Tensor:
        return compare(target, events, layout.row, layout.offsets)

    assert torch.autograd.gradcheck(compared, (history.target, history.events))
    t, h = history.target[layout.row], history.events
    want = torch.cat([t, h, t - h, t * h], dim=1)
    assert torch.equal(compared(history.target, history.events), want)


def test_a_batch_without_an_event_pools_to_zero_and_trains():
    attention = TargetAttention(WIDTH, (5,), activation="dice")
    history = History(torch.zeros(0, WIDTH), torch.tensor([0, 0]), torch.randn(2, WIDTH))
    pooled = attention(history.target, history.events, layout_of(history))
    assert torch.equal(pooled, torch.zeros(2, WIDTH))
    pooled.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())
