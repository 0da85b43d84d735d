"""A loss of a part of the model, beside whatever the host computes."""

from copy import deepcopy

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.hilomoe import auxiliary_loss, set_auxiliary_loss_scale
from torchrec_hilomoe.hilomoe.losses import attached_losses, AttachedLoss

WIDTH = 3


class Host(nn.Module):
    """A map with an opinion about its own output."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, 1)
        self.small = AttachedLoss(weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x)
        return self.small(y, y.square().sum(), torch.ones_like(y).sum())


def gradients(weight: float, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of the host's own loss with the attached one, and what that should be."""
    torch.manual_seed(1)
    model = Host(weight).double()
    set_auxiliary_loss_scale(model, scale)
    model(x).sin().sum().backward()
    got = model.map.weight.grad
    assert got is not None
    y = model.map(x)
    wanted = y.sin().sum() + scale * weight * y.square().mean()
    (want,) = torch.autograd.grad(wanted, [model.map.weight])
    return got, want


def test_its_gradient_joins_that_of_the_host():
    x = torch.randn(5, WIDTH).double()
    for weight, scale in ((0.7, 1.0), (2.0, 0.25), (0.0, 1.0)):
        got, want = gradients(weight, x, scale=scale)
        assert_within(got, want, float64_rounding(x, want))


def test_it_joins_once_however_often_the_output_is_used():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    y = model(x)
    (y.sum() + 3 * y.sin().sum() - y.sum()).backward()
    got = model.map.weight.grad
    y = model.map(x)
    (want,) = torch.autograd.grad(3 * y.sin().sum() + 0.5 * y.square().mean(), [model.map.weight])
    assert got is not None
    assert_within(got, want, float64_rounding(model, x, want))


def test_the_output_is_the_carrier_itself():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    assert torch.equal(model(x), model.map(x))


def test_its_value_is_read_unscaled():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    assert model.small.value is None
    assert auxiliary_loss(model) == 0
    set_auxiliary_loss_scale(model, 8.0)
    model(x)
    want = model.map(x).square().mean()
    assert model.small.value is not None
    assert not model.small.value.requires_grad
    rounding = float64_rounding(model, x, want)
    assert_within(model.small.value.double(), want, rounding)
    assert_within(auxiliary_loss(model).double(), 0.5 * want, rounding)
    assert attached_losses(model) == {"small": model.small}
    assert deepcopy(model).small.value is None


def test_without_items_there_is_nothing_to_add():
    got, want = gradients(0.5, torch.zeros(0, WIDTH).double())
    assert torch.equal(got, torch.zeros_like(want))


def test_nothing_is_computed_where_nothing_learns():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    assert model.small.value is None
    assert model.map.weight.grad is not None
    assert_within(model.map.weight.grad, x.sum(dim=0, keepdim=True), float64_rounding(x))


def test_it_is_traced_as_it_is():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    traced = torch.fx.symbolic_trace(model)
    traced(x).sin().sum().backward()
    got = model.map.weight.grad
    model.zero_grad()
    model(x).sin().sum().backward()
    assert got is not None
    assert model.map.weight.grad is not None
    assert torch.equal(got, model.map.weight.grad)


# Dynamo makes an instance of an autograd function to trace it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_without_a_graph_break():
    model, x = Host(0.5).double(), torch.randn(5, WIDTH).double()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sin().sum().backward()
    got = model.map.weight.grad
    model.zero_grad()
    model(x).sin().sum().backward()
    want = model.map.weight.grad
    assert got is not None
    assert want is not None
    assert_within(got, want, float64_rounding(model, x, want))


@pytest.mark.parametrize("scale", ["a", float("nan"), float("inf"), None])
def test_what_is_no_factor_is_refused_and_the_scale_stays(scale):
    model = Host(1.0)
    set_auxiliary_loss_scale(model, 0.5)
    with pytest.raises(ValueError, match=f"scale must be a finite number, got {scale!r}. Give"):
        set_auxiliary_loss_scale(model, scale)
    assert model.small.scale == 0.5
