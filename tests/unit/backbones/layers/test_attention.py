"""Self-attention over jagged rows; its numbers are proved with BST's."""

import re

import pytest
import torch

from tests.helpers.rounding import assert_within, rounding_of, within
from torchrec_hilomoe.backbones.layers.attention import SelfAttention
from torchrec_hilomoe.backbones.layers.jagged import valid

OFFSETS = torch.tensor([0, 1, 4, 6])
WIDTH = 8


def pair(num_heads: int) -> tuple[SelfAttention, SelfAttention]:
    """The same layer for all tokens and for targets only."""
    full = SelfAttention(WIDTH, num_heads)
    targets = SelfAttention(WIDTH, num_heads, targets_only=True)
    targets.load_state_dict(full.state_dict())
    return full, targets


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_targets_only_are_the_targets_rows_of_the_whole(num_heads):
    full, targets = pair(num_heads)
    x = torch.randn(6, WIDTH)
    whole = full(x, OFFSETS, 3)
    assert whole.shape == (6, WIDTH)
    rounding = rounding_of(full, x, OFFSETS, 3)
    assert_within(targets(x, OFFSETS, 3), whole[OFFSETS[:-1]], rounding)


def test_a_token_sees_its_own_row_only():
    full, _ = pair(2)
    x = torch.randn(6, WIDTH)
    before, rounding = full(x, OFFSETS, 3), rounding_of(full, x, OFFSETS, 3)
    x[4] += 1.0  # in the last row
    after = full(x, OFFSETS, 3)
    assert torch.equal(before[:4], after[:4])
    assert not within(before[4:], after[4:], rounding).all(dim=1).any()


def test_a_hidden_token_is_not_attended_to():
    full, _ = pair(2)
    x = torch.randn(6, WIDTH)
    visible = valid(OFFSETS, 3)
    assert torch.equal(full(x, OFFSETS, 3, visible), full(x, OFFSETS, 3))
    visible[1, 1] = False  # token 2
    before, rounding = full(x, OFFSETS, 3, visible), rounding_of(full, x, OFFSETS, 3, visible)
    x[2] += 1.0
    after = full(x, OFFSETS, 3, visible)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(before[others], after[others])
    assert not within(before[2], after[2], rounding).all()


def test_dropout_is_of_weights_and_only_in_training():
    attention = SelfAttention(WIDTH, 2, dropout=0.5)
    x = torch.randn(6, WIDTH)
    assert not torch.equal(attention(x, OFFSETS, 3), attention(x, OFFSETS, 3))
    attention.eval()
    assert torch.equal(attention(x, OFFSETS, 3), attention(x, OFFSETS, 3))


def test_heads_must_divide_the_width():
    message = "must divide width, got num_heads=3 and width=8. Change the heads or model.embedding"
    with pytest.raises(ValueError, match=re.escape(message)):
        SelfAttention(WIDTH, 3)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        SelfAttention(WIDTH, 0)
