"""Dice against its equation in float64, both ways, and under mixed precision."""

import pytest
import torch

from torchrec_hilomoe.backbones.layers.dice import blend, Dice

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
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(*pair, cotangent) for pair in ((got, ours), (want, theirs)))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_learns_as_in_float32():
    dice = Dice(UNITS).train()
    with torch.no_grad():
        dice.alpha.copy_(torch.linspace(-1, 1, UNITS))
    x = torch.randn(ROWS, UNITS)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.to(torch.bfloat16).to(dtype).requires_grad_()
        with torch.autocast("cpu", enabled=dtype is torch.bfloat16):
            y = dice(leaf)
        gradients.append(torch.autograd.grad(y.float().square().sum(), [leaf, dice.alpha]))
    for exact, rounded in zip(*gradients, strict=True):
        torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.1)
