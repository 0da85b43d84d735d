"""Attention by products against plain loops."""

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.jagged import layout_of
from torchrec_hilomoe.backbones.layers.target_attention import ProductAttention
from torchrec_hilomoe.embeddings.features import History

WIDTH, LENGTHS = 3, (2, 0, 4, 1)


def make_history() -> History:
    return History(
        events=torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True),
        lengths=torch.tensor(LENGTHS),
        target=torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize("learned", [True, False])
def test_it_is_the_softmax_of_products(learned):
    attention, history = ProductAttention(WIDTH, learned=learned).double(), make_history()
    kernel = torch.eye(WIDTH, dtype=torch.float64)
    if learned:
        (parameter,) = attention.parameters()
        nn.init.normal_(parameter)
        kernel = parameter
    got = attention.weights(history.target, history.events, layout_of(history))
    rows = []
    for row, events in enumerate(history.events.split(list(LENGTHS))):
        if len(events):
            scores = torch.stack([(kernel @ event) @ history.target[row] for event in events])
            rows.append(torch.exp(scores) / torch.exp(scores).sum())
    want = torch.cat(rows)
    leaves = [history.events, history.target, *attention.parameters()]
    cotangent = torch.randn(7).double()
    rounding = float64_rounding(leaves, cotangent)
    assert_within(got, want, rounding)
    got_grads = torch.autograd.grad(got, leaves, cotangent)
    assert_within(got_grads, torch.autograd.grad(want, leaves, cotangent), rounding)


def test_a_learned_one_starts_as_the_plain_product():
    history = make_history()
    learned, plain = (
        ProductAttention(WIDTH, learned=learned)
        .double()
        .weights(history.target, history.events, layout_of(history))
        for learned in (True, False)
    )
    assert_within(learned, plain, float64_rounding(history))
