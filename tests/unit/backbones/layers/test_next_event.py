"""The auxiliary loss: which events it compares, and what it is."""

import pytest
import torch
from torch import Tensor

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.jagged import Layout, layout_of
from torchrec_hilomoe.backbones.layers.next_event import foreign_events, NextEventLoss
from torchrec_hilomoe.embeddings.features import History

WIDTH = 3
LENGTHS = (2, 0, 4, 1, 3)


def layout(lengths: tuple[int, ...]) -> Layout:
    total = sum(lengths)
    events, target = torch.zeros(total, WIDTH), torch.zeros(len(lengths), WIDTH)
    return layout_of(
        History(events=events, lengths=torch.tensor(lengths, dtype=torch.int64), target=target)
    )


def negatives(where: Layout) -> list[int]:
    return foreign_events(where.row, where.offsets).tolist()


def test_negatives_are_every_event_of_the_other_rows_equally_often():
    where, draws = layout(LENGTHS), 3000
    counts = torch.zeros(sum(LENGTHS), sum(LENGTHS))
    for _ in range(draws):
        drawn = torch.tensor(negatives(where))
        counts[torch.arange(len(drawn)), drawn] += 1
    foreign = where.row[:, None] != where.row[None, :]
    assert torch.equal(counts > 0, foreign)
    want = draws * foreign / foreign.sum(dim=1, keepdim=True)
    # Six standard deviations of a count.
    assert ((counts - want).abs() <= 6 * want.sqrt()).all()


def test_negatives_follow_torchs_random_state():
    where = layout(LENGTHS)
    state = torch.get_rng_state()
    first, second = negatives(where), negatives(where)
    torch.set_rng_state(state)
    assert [negatives(where), negatives(where)] == [first, second]
    assert first != second


def definition(
    loss: NextEventLoss, states: Tensor, events: Tensor, where: Layout, other: list[int]
) -> Tensor:
    """One event at a time."""
    lost = []
    for at in range(1, len(events)):
        if where.row[at] != where.row[at - 1]:
            continue  # nothing came before
        for event, label in ((at, 1.0), (other[at], 0.0)):
            logit = loss.mlp(torch.cat([states[at - 1], events[event]])[None])
            wanted = torch.tensor([label], dtype=logit.dtype)
            lost.append(torch.nn.functional.binary_cross_entropy_with_logits(logit, wanted))
    return 2 * torch.stack(lost).mean()  # of pairs


def test_it_is_the_cross_entropy_of_the_next_event_and_of_a_drawn_one():
    where, loss = layout(LENGTHS), NextEventLoss(WIDTH, 0.7, hidden=(5,)).double()
    states, events, carrier = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((sum(LENGTHS), WIDTH), (sum(LENGTHS), WIDTH), (len(LENGTHS), 2))
    )
    torch.manual_seed(4)
    other = negatives(where)
    torch.manual_seed(4)
    out = loss(carrier, states, events, where)
    assert torch.equal(out, carrier)
    parameters = [states, events, *loss.parameters()]
    want = definition(loss, states, events, where, other)
    assert loss.attached.value is not None
    assert_within(loss.attached.value.double(), want, float64_rounding(parameters))
    got = torch.autograd.grad(out.sum(), [carrier, *parameters])
    wanted = torch.autograd.grad(0.7 * want, parameters)
    assert torch.equal(got[0], torch.ones_like(carrier))
    assert_within(got[1:], wanted, float64_rounding(parameters))


@pytest.mark.parametrize(
    "lengths", [(0, 0), (), (5,), (0, 5, 0), (1, 1, 1)], ids=["none", "no rows", "1", "one", "ones"]
)
def test_without_anything_to_compare_there_is_no_loss(lengths):
    """No event, one row alone, or rows of one event."""
    where, loss = layout(lengths), NextEventLoss(WIDTH, 0.7)
    states = torch.randn(sum(lengths), WIDTH, requires_grad=True)
    carrier = torch.randn(len(lengths), 2, requires_grad=True)
    loss(carrier, states, torch.randn(sum(lengths), WIDTH), where).sum().backward()
    assert loss.attached.value == 0
    assert states.grad is not None
    assert not states.grad.any()
    assert carrier.grad is not None
    assert (carrier.grad == 1).all()


def test_evaluation_draws_nothing():
    where, loss = layout(LENGTHS), NextEventLoss(WIDTH, 0.7).eval()
    state = torch.get_rng_state()
    loss(torch.zeros(5, 2), torch.zeros(10, WIDTH), torch.zeros(10, WIDTH), where)
    assert torch.equal(torch.get_rng_state(), state)
    assert loss.attached.value is None


def test_it_can_be_learnt():
    """Where the next event repeats the state, the loss falls well below a coin's."""
    torch.manual_seed(2)
    where, loss = layout((6,) * 40), NextEventLoss(WIDTH, 1.0, hidden=(16,), activation="relu")
    optimizer, values = torch.optim.Adam(loss.parameters(), 0.02), []
    for _ in range(150):
        events = torch.randn(40, 1, WIDTH).expand(40, 6, WIDTH).flatten(0, 1)
        optimizer.zero_grad()
        loss(torch.zeros((), requires_grad=True), events, events, where).backward()
        optimizer.step()
        assert loss.attached.value is not None
        values.append(float(loss.attached.value))
    assert values[0] > 1.2  # 2 log 2 = 1.39
    assert sum(values[-10:]) / 10 < 0.8
