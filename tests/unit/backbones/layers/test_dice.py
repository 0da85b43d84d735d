"""Dice against its equation in float64, both ways, and under mixed precision."""

import pytest
import torch
from torch import Tensor

from tests.helpers.rounding import assert_within, float64_rounding, rounding_of
from torchrec_hilomoe.backbones.layers.mlp import blend, Dice

ROWS, UNITS = 9, 4


def equation(x, normal, alpha):
    gate = torch.sigmoid(normal)
    return gate * x + alpha * (1 - gate) * x


@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_values_and_gradients_are_those_of_the_equation(rows):
    leaves = [torch.randn(size, UNITS, dtype=torch.float64) for size in (rows, rows)]
    leaves.append(torch.randn(UNITS, dtype=torch.float64))
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    got, want = blend(*ours), equation(*theirs)
    cotangent = torch.randn_like(want)
    rounding = float64_rounding(leaves, cotangent)
    assert_within(got, want, rounding)
    gradients = (torch.autograd.grad(*pair, cotangent) for pair in ((got, ours), (want, theirs)))
    mine, other = gradients
    assert_within(mine, other, rounding)


def test_under_autocast_it_learns_as_in_float32():
    dice = Dice(UNITS).train()
    with torch.no_grad():
        dice.alpha.copy_(torch.linspace(-1, 1, UNITS))
    x = torch.randn(ROWS, UNITS).bfloat16()

    def gradients(dice: Dice, x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", enabled=x.dtype is torch.bfloat16):
            y = dice(leaf)
        return torch.autograd.grad(y.float().square().sum(), [leaf, dice.alpha])

    rounding = rounding_of(gradients, dice, x.float(), dtype=torch.bfloat16, terms=1)
    exact = [gradient.double() for gradient in gradients(dice, x.float())]
    assert_within(gradients(dice, x), exact, rounding)
