"""The recurrence against a loop in float64, ``nn.GRU``, and FuxiCTR's AUGRU."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from tests.helpers.fuxictr import fuxictr_model
from tests.helpers.rounding import assert_within, float64_rounding, of_sums, value_and_grads
from torchrec_hilomoe.backbones.layers.gru import GRU, recur

# Rows of many lengths, some of them empty; equal ones; one.
LENGTHS = [(3, 0, 5, 1, 1, 0, 4), (4, 4, 4), (6,)]
WIDTHS = [1, 5]


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def make_case(lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    total = sum(lengths)
    tensors = {
        "inputs": torch.randn(total, 3 * width),
        "weight": torch.randn(3 * width, width),
        "bias": torch.randn(3 * width),
        "attention": torch.rand(total),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def loop(
    inputs: Tensor, weight: Tensor, bias: Tensor, attention: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """States after each event, then each row's last, one event at a time."""
    W, at, every, last = weight.shape[1], 0, [], []
    for length in lengths:
        h = inputs.new_zeros(W)
        for _ in range(length):
            i_u, i_r, i_n = inputs[at].split(W)
            s_u, s_r, s_n = (weight @ h + bias).split(W)
            update = attention[at] / (1 + torch.exp(-i_u - s_u))
            reset = 1 / (1 + torch.exp(-i_r - s_r))
            h = h + update * (torch.tanh(i_n + reset * s_n) - h)
            every.append(h)
            at += 1
        last.append(h)
    return torch.stack([*every, *last])


def ours(attended: bool, offsets: Tensor, **tensors: Tensor) -> tuple[Tensor, None]:
    attention = tensors["attention"] if attended else None
    states = recur(tensors["inputs"], tensors["weight"], tensors["bias"], attention, offsets)
    return torch.cat([states.every, states.last]), None


def slow(attended: bool, lengths: tuple[int, ...], **tensors: Tensor) -> tuple[Tensor, None]:
    if not attended:
        tensors["attention"] = torch.ones_like(tensors["attention"])
    return loop(**tensors, lengths=lengths), None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attended", [True, False], ids=["augru", "gru"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients_are_those_of_the_loop(lengths, width, attended, dtype):
    inputs = make_case(lengths, width, dtype)
    cotangent = torch.randn(sum(lengths) + len(lengths), width).to(dtype)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    got = value_and_grads(partial(ours, attended, offsets_of(lengths)), inputs, cotangent)
    want = value_and_grads(partial(slow, attended, lengths), exact, cotangent.double())
    # Every step rounds what the one before has left, in 32 bits at least, so errors add up over
    # the longest row; in 16 bits, only what goes out is rounded once more.
    eps = torch.finfo(dtype).eps
    unit = min(eps, torch.finfo(torch.float32).eps) * max(lengths) * of_sums(3 * width)
    for name, tensor in want.items():
        bound = eps * tensor.abs() + unit * max(1.0, float(tensor.abs().max()))
        assert ((got[name].double() - tensor).abs() <= bound).all(), name


@pytest.mark.parametrize("lengths", [(0, 0), ()], ids=["no events", "no rows"])
def test_without_events_states_are_zero_and_so_are_gradients(lengths):
    tensors = make_case(lengths, 3, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    states = recur(**rename(leaves), attention_T=leaves["attention"], offsets=offsets_of(lengths))
    assert states.every.shape == (0, 3)
    assert torch.equal(states.last, torch.zeros(len(lengths), 3))
    (states.last.sum() + states.every.sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert not leaf.grad.any(), name


@pytest.mark.parametrize("attended", [True, False], ids=["augru", "gru"])
def test_gradients_are_those_of_finite_differences(attended):
    lengths = (3, 0, 2, 1)
    tensors = make_case(lengths, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def outputs(inputs: Tensor, weight: Tensor, bias: Tensor, attention: Tensor):
        states = recur(inputs, weight, bias, attention if attended else None, offsets_of(lengths))
        return states.every, states.last

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("part", ["every", "last"])
def test_one_of_the_two_outputs_may_go_unused(part):
    lengths = (3, 0, 2)
    tensors = make_case(lengths, 3, torch.float64)
    rows = slice(None, 5) if part == "every" else slice(5, None)

    def fast(**tensors: Tensor) -> tuple[Tensor, None]:
        attention = tensors.pop("attention")
        states = recur(**rename(tensors), attention_T=attention, offsets=offsets_of(lengths))
        return getattr(states, part), None

    def definition(**tensors: Tensor) -> tuple[Tensor, None]:
        return loop(**tensors, lengths=lengths)[rows], None

    cotangent = torch.randn(5 if part == "every" else 3, 3).double()
    want = value_and_grads(definition, tensors, cotangent)
    got = value_and_grads(fast, tensors, cotangent)
    assert_within(got, want, float64_rounding(tensors, cotangent, want))


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "inputs_TG": tensors["inputs"],
        "weight_GW": tensors["weight"],
        "bias_G": tensors["bias"],
    }


def as_torch(gru: GRU, width: int) -> nn.GRU:
    """``nn.GRU`` says how much it keeps, not how much is new, and has that gate second."""
    theirs = nn.GRU(width, width)

    def turned(parameter: Tensor) -> Tensor:
        update, reset, new = parameter.detach().chunk(3)
        return torch.cat([reset, -update, new])

    with torch.no_grad():
        theirs.get_parameter("weight_ih_l0").copy_(turned(gru.input.weight))
        theirs.get_parameter("bias_ih_l0").copy_(turned(gru.input.bias))
        theirs.get_parameter("weight_hh_l0").copy_(turned(gru.hidden_weight))
        theirs.get_parameter("bias_hh_l0").copy_(turned(gru.hidden_bias))
    return theirs


def test_without_attention_it_is_torchs_gru():
    lengths, width = (3, 2, 5, 1, 1), 4
    gru = GRU(width).double()
    theirs = as_torch(gru, width).double()
    events = torch.randn(sum(lengths), width).double()
    mine, other = (events.clone().requires_grad_() for _ in range(2))
    states = gru(mine, offsets_of(lengths))
    packed = pack_sequence(list(other.split(lengths)), enforce_sorted=False)
    _, last = theirs(packed)
    cotangent = torch.randn(len(lengths), width).double()
    got = torch.autograd.grad(states.last, [mine, gru.hidden_weight], cotangent)
    want = torch.autograd.grad(last[0], [other, theirs.get_parameter("weight_hh_l0")], cotangent)
    rounding = float64_rounding(gru, events, cotangent, want)
    assert_within(states.last, last[0], rounding)
    update, reset, new = got[1].chunk(3)
    assert_within([got[0], torch.cat([reset, -update, new])], want, rounding)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 1, 5)], ids=["full", "jagged"])
def test_with_attention_it_is_fuxictrs_augru(lengths):
    width = 6
    package: Any = import_module(fuxictr_model("DIEN").__module__)
    theirs = package.DynamicGRU(width, width).double()
    gru = GRU(width).double()
    gru.input = theirs.gru_cell.x2h
    with torch.no_grad():
        gru.hidden_weight.copy_(theirs.gru_cell.h2h.weight)
        gru.hidden_bias.copy_(theirs.gru_cell.h2h.bias)
    events, attention = torch.randn(sum(lengths), width).double(), torch.rand(sum(lengths)).double()
    leaves = [tensor.clone().requires_grad_() for tensor in (events, attention, events, attention)]
    states = gru(leaves[0], offsets_of(lengths), leaves[1])

    def packed(values: Tensor) -> Any:
        padded = nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)
        return pack_padded_sequence(padded, torch.tensor(lengths), True, enforce_sorted=False)

    last = theirs(packed(leaves[2]), packed(leaves[3]))[1]
    cotangent = torch.randn(len(lengths), width).double()
    mine = torch.autograd.grad(
        states.last, [*leaves[:2], gru.input.weight, gru.hidden_weight, gru.hidden_bias], cotangent
    )
    cell = theirs.gru_cell
    other = torch.autograd.grad(
        last, [*leaves[2:], cell.x2h.weight, cell.h2h.weight, cell.h2h.bias], cotangent
    )
    rounding = float64_rounding(gru, leaves, cotangent, other)
    assert_within(states.last, last, rounding)
    assert_within(mine, other, rounding)
