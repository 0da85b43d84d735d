"""What the recurrence is to PyTorch: one operator, whichever way a model is captured."""

import pytest
import torch
from torch import nn, Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.gru import GRU, States

WIDTH = 4
OFFSETS = torch.tensor([0, 3, 3, 8, 9])
EVENTS = int(OFFSETS[-1])


class Last(nn.Module):
    """An AUGRU whose states nobody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = GRU(WIDTH)

    def forward(self, events: Tensor, offsets: Tensor, attention: Tensor) -> Tensor:
        return self.gru(events, offsets, attention).last


def inputs(offsets: Tensor = OFFSETS) -> tuple[Tensor, Tensor, Tensor]:
    events = int(offsets[-1])
    return torch.randn(events, WIDTH), offsets, torch.rand(events)


# torch 2.14 hides this warning of its own where it reads .grad, but not from a filter that makes it
# an error. Goes when opcheck reads leaves alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("attended", [True, False])
def test_the_operator_keeps_what_it_promises_to_pytorch(attended):
    """Schema, fake tensors, autograd registration, and gradients under AOT."""
    arguments = (
        torch.randn(EVENTS, 3 * WIDTH, requires_grad=True),
        torch.randn(3 * WIDTH, WIDTH, requires_grad=True),
        torch.randn(3 * WIDTH, requires_grad=True),
        torch.rand(EVENTS, requires_grad=True) if attended else None,
        OFFSETS,
    )
    torch.library.opcheck(torch.ops.torchrec_hilomoe.gru.default, arguments)


def test_fx_traces_it_as_one_operator():
    model = Last()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.torchrec_hilomoe.gru) == 1
    for offsets in (OFFSETS, torch.tensor([0, 1, 7])):  # other rows, and more steps
        arguments = inputs(offsets)
        assert torch.equal(traced(*arguments), model(*arguments))


def test_it_exports_for_any_number_of_rows_events_and_steps():
    model = Last()
    free = torch.export.Dim.AUTO
    exported = torch.export.export(
        model, inputs(), dynamic_shapes=({0: free}, {0: free}, {0: free})
    )
    for offsets in (OFFSETS, torch.tensor([0, 0, 6, 17])):
        arguments = inputs(offsets)
        assert torch.equal(exported.module()(*arguments), model(*arguments))


def test_it_compiles_without_a_graph_break():
    model = Last().double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for offsets in (OFFSETS, torch.tensor([0, 0, 6, 17])):
        events, _, attention = inputs(offsets)
        arguments = events.double(), offsets, attention.double()
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(*arguments).square().sum().backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        assert_within(grads[1], grads[0], float64_rounding(model, arguments, grads[0]))


def test_it_recurs_in_32_bits_under_autocast():
    """Sixteen bits would be rounded at every step, and the errors would add up."""
    model, arguments = Last(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*arguments)
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = model.gru.input(arguments[0])
    states = torch.ops.torchrec_hilomoe.gru(
        gates.float(), model.gru.hidden_weight, model.gru.hidden_bias, arguments[2], OFFSETS
    )
    assert torch.equal(low, states[1].to(torch.bfloat16))


def test_its_flops_are_those_of_the_states_maps():
    gru, (events, offsets, _) = GRU(WIDTH), inputs(torch.tensor([0, 3, 6, 9]))
    with FlopCounterMode(display=False) as counter:
        gru(events, offsets).last.sum().backward()
    product = 2 * WIDTH * 3 * WIDTH
    # Forward, then the gradients by inputs and weight; the first state of a row is zero, and
    # nobody asks for the events' own gradient.
    assert counter.get_total_flops() == 2 * 9 * product + 3 * 6 * product


def test_an_event_without_attention_moves_nothing():
    gru, (events, offsets, attention) = GRU(WIDTH), inputs()
    attention[4] = 0.0
    states = gru(events, offsets, attention)
    assert torch.equal(states.every[4], states.every[3])
    assert isinstance(states, States)


def test_later_events_do_not_reach_earlier_states():
    gru, (events, offsets, attention) = GRU(WIDTH), inputs()
    before = gru(events, offsets, attention).every
    events[6] += 1
    after = gru(events, offsets, attention).every
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False] * 6 + [True, True, False]


def test_it_starts_as_torchs_gru_does():
    torch.manual_seed(1)
    gru = GRU(100)
    for parameter in gru.parameters():
        assert parameter.abs().max() <= 0.1
        assert parameter.abs().max() > 0.09
    built = GRU(100).to("meta").to_empty(device="cpu")
    built.reset_parameters()
    assert all(p.isfinite().all() and p.abs().max() <= 0.1 for p in built.parameters())
