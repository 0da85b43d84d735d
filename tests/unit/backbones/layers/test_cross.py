"""The cross network and its head against float64 definitions, and against FuxiCTR's."""

import copy
import re

import pytest
import torch
from torch import nn, Tensor
from torch.func import functional_call

from tests.helpers.fuxictr import fuxictr_layers
from tests.helpers.rounding import (
    assert_as_exact_as,
    assert_within,
    float64_rounding,
    of_sums,
    value_and_grads,
)
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe
from torchrec_hilomoe.backbones.layers.cross import CrossHead, CrossNetwork

SHAPES = [(1, 1, 1), (5, 7, 3), (3, 33, 2)]  # rows, width, layers


def definition(x: Tensor, layers: int, params: dict[str, Tensor]) -> Tensor:
    """A row and a feature at a time: it times a linear form, added to it."""
    rows = []
    for start in x:
        row = start
        for layer in range(layers):
            weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
            row = torch.stack(
                [row[i] + start[i] * (weight[i] @ row + bias[i]) for i in range(len(row))]
            )
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition_in_float64(shape, dtype):
    rows, width, layers = shape
    net = CrossNetwork(width, layers).to(dtype)
    inputs = {"x": torch.randn(rows, width).to(dtype), **dict(net.named_parameters())}
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    cotangent = torch.randn(rows, width).to(dtype)

    def fast(x: Tensor, **params: Tensor) -> tuple[Tensor, None]:
        return functional_call(net, params, (x,)), None

    def slow(x: Tensor, **params: Tensor) -> tuple[Tensor, None]:
        return definition(x, layers, params), None

    exact = {name: tensor.double() for name, tensor in inputs.items()}
    got = value_and_grads(fast, inputs, cotangent)
    want = value_and_grads(slow, exact, cotangent.double())
    # The same definition of absolute values adds up the terms; the dtype does the rest.
    positive = {name: tensor.abs() for name, tensor in exact.items()}
    terms = value_and_grads(slow, positive, cotangent.double().abs())
    unit = torch.finfo(dtype).eps * layers * of_sums(rows + width)
    for name in want:
        excess = (got[name].double() - want[name]).abs() - unit * terms[name]
        assert excess.max() <= 0, name


def test_is_fuxictrs():
    theirs = fuxictr_layers().CrossNetV2(17, 3)
    ours = CrossNetwork(17, 3)
    ours.load_state_dict(
        {k.replace("cross_layers", "layers"): v for k, v in theirs.state_dict().items()}
    )
    x, cotangent = torch.randn(9, 17), torch.randn(9, 17)

    def run(net: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        net = copy.deepcopy(net).to(dtype)
        names = [name.replace("cross_layers", "layers") for name, _ in net.named_parameters()]
        leaf = x.to(dtype).requires_grad_()
        y = net(leaf)
        grads = torch.autograd.grad(y, [leaf, *net.parameters()], cotangent.to(dtype))
        return {"y": y.detach(), **dict(zip(["x", *names], grads, strict=True))}

    exact, plain = run(theirs, torch.float64), run(theirs, torch.float32)
    assert_as_exact_as(run(ours, torch.float32), plain, exact, torch.float32, terms=17)


@pytest.mark.parametrize("hidden", [(), (5,), (6, 4)], ids=str)
def test_the_head_reads_crosses_and_hidden_layers_side_by_side(hidden):
    head, x = CrossHead(7, hidden, cross_layers=2).double(), torch.randn(9, 7).double()
    deep = x
    for layer in head.hidden:
        if isinstance(layer, nn.Linear):
            deep = (deep @ layer.weight.T + layer.bias).clamp(min=0)
    crossed = definition(x, 2, dict(head.cross.named_parameters()))
    weight, bias = head.output.weight[0], head.output.bias
    want = crossed @ weight[:7] + deep @ weight[7:] + bias
    assert_within(head(x), want, float64_rounding(head, x, want))


def test_the_head_has_the_options_of_hidden_layers():
    head = CrossHead(7, (5,), activation="silu", dropout=0.5, batch_norm=True)
    kinds = [type(layer) for layer in head.hidden]
    assert kinds[0] is nn.Linear
    assert kinds[2:] == [nn.SiLU, nn.Dropout]


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_low_rank_is_a_product_of_two_narrow_matrices(rank):
    low, full = CrossNetwork(7, 2, low_rank=rank).double(), CrossNetwork(7, 2).double()
    state = dict(low.named_parameters())
    with torch.no_grad():
        for layer, parameters in enumerate(full.layers):
            assert isinstance(parameters, nn.Linear)
            up, down = state[f"layers.{layer}.1.weight"], state[f"layers.{layer}.0.weight"]
            assert up.shape[1] == down.shape[0] == rank
            parameters.weight.copy_(up @ down)
            parameters.bias.copy_(state[f"layers.{layer}.1.bias"])
    x = torch.randn(5, 7).double()
    assert_within(low(x), full(x), float64_rounding(low, x, full(x)))


def test_layers_can_carry_experts():
    head = CrossHead(7, (5,), cross_layers=2)
    x = torch.randn(3, 7)
    before = head(x)
    found = inject_hilomoe(head, HiLoMoEConfig(num_experts=2), sites=["cross.*"])
    assert found == ["cross.layers.0", "cross.layers.1"]
    assert torch.equal(head(x), before)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_network_without_layers_is_refused(layers):
    message = f"CrossNetwork.num_layers must be at least 1, got {layers}"
    with pytest.raises(ValueError, match=re.escape(message)):
        CrossHead(7, (5,), cross_layers=layers)
