"""Metrics against scikit-learn and against their definitions in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from tests.helpers.rounding import rounded
from torchrec_hilomoe.training.metrics import auc, compute_metrics, gauc, logloss, Predictions

# Few distinct scores and groups, so that ties and groups of one class are the rule.
ROWS = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(-2, 2)), min_size=1, max_size=60
)


def arrays(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, groups = np.array(rows).T
    return scores / 2, labels.astype(np.float64), groups


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@given(ROWS)
def test_auc_is_scikit_learns(rows):
    scores, labels, _ = arrays(rows)
    if 0 < labels.mean() < 1:
        assert auc(scores, labels) == rounded(roc_auc_score(labels, scores), terms=len(labels))
    else:
        assert math.isnan(auc(scores, labels))


@given(ROWS)
def test_gauc_is_the_mean_of_scikit_learns_weighted_by_rows(rows):
    scores, labels, groups = arrays(rows)
    found = [
        (int(at.sum()), roc_auc_score(labels[at], scores[at]))
        for at in (groups == group for group in np.unique(groups))
        if 0 < labels[at].mean() < 1
    ]
    if found:
        want = sum(count * value for count, value in found) / sum(count for count, _ in found)
        assert gauc(scores, labels, groups) == rounded(want, terms=len(labels))
    else:
        assert math.isnan(gauc(scores, labels, groups))


def test_auc_of_many_rows_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=20_000).astype(np.float64)
    scores = np.round(rng.normal(size=20_000) + labels, 2)
    assert auc(scores, labels) == rounded(roc_auc_score(labels, scores), terms=len(labels))


@given(ROWS)
def test_logloss_is_scikit_learns(rows):
    logits, labels, _ = arrays(rows)
    want = log_loss(labels, sigmoid(logits), labels=[0, 1])
    assert logloss(logits, labels) == rounded(want, terms=len(labels))


@given(ROWS)
def test_normalised_entropy_compares_with_the_base_rate(rows):
    logits, labels, groups = arrays(rows)
    rate = labels.mean()
    found = compute_metrics(logits, labels, groups)
    if 0 < rate < 1:
        base = log_loss(labels, np.full(len(labels), rate), labels=[0, 1])
        assert found.ne == rounded(logloss(logits, labels) / base, terms=len(labels))
    else:
        assert math.isnan(found.ne)


def test_extreme_logits_are_finite_and_exact():
    logits = np.array([800.0, -800.0, 800.0, 0.0], dtype=np.float32)
    labels = np.array([1.0, 0.0, 0.0, 1.0])
    assert logloss(logits, labels) == rounded((800 + math.log(2)) / 4)


def test_without_rows_nothing_has_a_value():
    nothing = np.array([])
    found = compute_metrics(nothing, nothing, nothing.astype(np.int64))
    assert found.rows == 0
    assert all(math.isnan(value) for value in (found.auc, found.gauc, found.logloss, found.ne))


def test_groups_need_not_be_sorted_and_one_class_groups_are_skipped():
    scores = np.array([0.1, 0.9, 0.8, 0.3, 0.5, 0.5])
    labels = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    groups = np.array([7, 7, -3, -3, 11, 11])  # right, wrong, one class
    assert gauc(scores, labels, groups) == 0.5
    assert math.isnan(gauc(scores, labels, np.arange(6)))


@pytest.mark.usefixtures("alone")
def test_predictions_leave_out_rows_without_weight():
    predictions = Predictions()
    assert predictions.metrics().rows == 0
    predictions.add(
        logits=torch.tensor([0.5, -1.0, 2.0]),
        labels=torch.tensor([1.0, 0.0, 0.0]),
        groups=torch.tensor([1, 1, 1]),
        weights=torch.tensor([1.0, 1.0, 0.0]),
    )
    found = predictions.metrics()
    assert (found.rows, found.auc) == (2, 1.0)
    assert found.logloss == rounded(logloss(np.array([0.5, -1.0]), np.array([1.0, 0.0])))
    predictions.clear()
    assert predictions.metrics().rows == 0


@pytest.mark.usefixtures("alone")
def test_groups_keep_every_bit():
    """Groups may be hashes of 64 bits, more than a float holds."""
    predictions = Predictions()
    predictions.add(
        logits=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        labels=torch.tensor([0.0, 1.0, 0.0, 1.0]),
        groups=torch.tensor([2**60, 2**60, 2**60 + 1, 2**60 + 1]),
        weights=torch.ones(4),
    )
    assert predictions.metrics().gauc == 1.0
