"""Rotary positions: what is turned, and that only distances are seen."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.rounding import assert_within, of_sums
from torchrec_hilomoe.backbones.layers.attention import rotate, rotation_of


def turned(x: torch.Tensor, positions: torch.Tensor, heads: int) -> torch.Tensor:
    rotation = rotation_of(positions, x.shape[1] // heads, x.dtype)
    return rotate(x, rotation, heads)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 200))
def test_each_pair_of_a_head_is_turned_by_its_own_angle(heads, pairs, position):
    width = 2 * pairs
    x = torch.randn(1, heads * width)
    got = turned(x, torch.tensor([position]), heads)
    for head in range(heads):
        for pair in range(pairs):
            first, second = head * width + pair, head * width + pairs + pair
            start = complex(x[0, first].item(), x[0, second].item())
            angle = position * 10_000 ** (-pair / pairs)
            want = start * complex(math.cos(angle), math.sin(angle))
            found = complex(got[0, first].item(), got[0, second].item())
            # The angle is rounded to float32; so are the numbers.
            assert abs(found - want) <= 4 * 2**-23 * abs(start) * (1 + angle)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_products_depend_on_the_distance_alone(here, there, shift):
    query, key = torch.randn(1, 12), torch.randn(1, 12)

    def product(at: int, other: int) -> torch.Tensor:
        return turned(query, torch.tensor([at]), 2) @ turned(key, torch.tensor([other]), 2).T

    moved = product(here + shift, there + shift)
    # An angle is rounded to float32, and is at most the position.
    bound = 8 * 2**-24 * (1 + max(here, there) + shift) * query.norm() * key.norm()
    assert (moved - product(here, there)).abs() <= bound


def test_products_do_depend_on_the_distance():
    query, key = torch.ones(1, 4), torch.ones(1, 4)
    near = turned(query, torch.tensor([0]), 1) @ turned(key, torch.tensor([1]), 1).T
    far = turned(query, torch.tensor([0]), 1) @ turned(key, torch.tensor([2]), 1).T
    assert near > far + 0.1


def test_lengths_are_kept_and_the_first_position_is_not_turned():
    x, positions = torch.randn(5, 8), torch.arange(5)
    # Sines and cosines are rounded, products of them, and eight squares.
    unit = of_sums(3 + 8) * torch.finfo(torch.float32).eps
    lengths = x.norm(dim=1)
    assert_within(turned(x, positions, 2).norm(dim=1), lengths, unit * lengths)
    assert torch.equal(turned(x, torch.zeros(5, dtype=torch.int64), 2), x)


def test_far_positions_differ_in_bfloat16():
    """Positions themselves do not: bfloat16 has no 257."""
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    got = turned(x, torch.tensor([256, 257]), 1)
    assert got.dtype == torch.bfloat16
    assert not torch.equal(got[0], got[1])
