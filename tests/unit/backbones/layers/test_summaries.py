"""Attention pooling; its numbers are proved with InterFormer's."""

import pytest
import torch

from tests.helpers.rounding import assert_within, rounding_of, within
from torchrec_hilomoe.backbones.layers.summaries import AttentionPooling

OFFSETS = torch.tensor([0, 1, 4, 6])
WIDTH = 8


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_the_order_of_a_rows_tokens_does_not_matter(num_heads):
    pool, x = AttentionPooling(WIDTH, num_heads, 3), torch.randn(6, WIDTH)
    pooled, rounding = pool(x, OFFSETS, 3), rounding_of(pool, x, OFFSETS, 3)
    assert pooled.shape == (3, 3, WIDTH)
    assert_within(pool(x[[0, 3, 1, 2, 5, 4]], OFFSETS, 3), pooled, rounding)
    assert not within(pool(x[[1, 0, 2, 3, 4, 5]], OFFSETS, 3), pooled, rounding).all()


def test_a_token_is_seen_by_its_own_row_only_and_padding_by_none():
    pool, x = AttentionPooling(WIDTH, 2, 3), torch.randn(6, WIDTH)
    before, rounding = pool(x, OFFSETS, 3), rounding_of(pool, x, OFFSETS, 3)
    x[4] += 1.0  # in the last row
    after = pool(x, OFFSETS, 3)
    assert torch.equal(before[:2], after[:2])
    assert not within(before[2], after[2], rounding).all(dim=1).any()
    assert_within(pool(x, OFFSETS, 9), after, rounding)


def test_one_token_is_its_own_mean_whatever_is_asked():
    pool, x = AttentionPooling(WIDTH, 2, 3), torch.randn(1, WIDTH)
    want, offsets = pool.output(pool.value(x)), torch.tensor([0, 1])
    rounding = rounding_of(pool, x, offsets, 1)
    assert_within(pool(x, offsets, 1), want.expand(1, 3, -1), rounding)


def test_questions_differ_from_the_start():
    pool, x = AttentionPooling(WIDTH, 2, 3), torch.randn(6, WIDTH)
    rounding = rounding_of(pool, x, OFFSETS, 3)
    first, second, third = pool(x, OFFSETS, 3).unbind(dim=1)
    assert not within(first[1:], second[1:], rounding).all(dim=1).any()
    assert not within(second[1:], third[1:], rounding).all(dim=1).any()


def test_without_questions_there_is_no_token():
    assert AttentionPooling(WIDTH, 2, 0)(torch.randn(6, WIDTH), OFFSETS, 3).shape == (3, 0, WIDTH)


def test_dropout_is_of_weights_and_only_in_training():
    pool, x = AttentionPooling(WIDTH, 2, 3, dropout=0.5), torch.randn(6, WIDTH)
    assert not torch.equal(pool(x, OFFSETS, 3), pool(x, OFFSETS, 3))
    pool.eval()
    assert torch.equal(pool(x, OFFSETS, 3), pool(x, OFFSETS, 3))
