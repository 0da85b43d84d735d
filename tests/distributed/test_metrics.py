"""Metrics in bounded memory: as exact with a capacity of a few rows as with all in memory."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import distributed as dist

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.metrics import (
    compute_metrics,
    Predictions,
    predictions,
    SlicedPredictions,
)
from torchrec_hilomoe.training.metrics.predictions import TooManySlicesError

# Few scores and groups, so that ties, groups of one class and groups over borders are the rule.
ROWS = st.lists(
    st.tuples(
        st.integers(-3, 3), st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, 0.5, 1.0, 3.0])
    ),
    max_size=60,
)


def arrays(rows):
    scores, labels, groups, weights = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return scores / 2, labels, groups.astype(np.int64), weights


def collected(kind, scores, labels, groups, weights, *, batches=7):
    for at in np.array_split(np.arange(len(scores)), batches):
        columns = (torch.from_numpy(column[at]) for column in (scores, labels, groups, weights))
        kind.add(*columns)
    return kind


def many(rows, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.3).astype(np.float64)
    scores = np.round(rng.normal(size=rows) + labels, 2).astype(np.float32).astype(np.float64)
    # A third of the rows in one group, most others in groups of a few.
    groups = np.where(rng.random(rows) < 0.3, 2**60, rng.integers(0, rows // 4, size=rows))
    return scores, labels, groups, rng.choice([0.0, 0.5, 1.0, 2.0], size=rows)


@pytest.fixture
def alone():
    """The only process of a job."""
    with init_distributed("cpu"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Every batch goes to the sorted runs at once."""
    monkeypatch.setattr(predictions, "WAITING", 0)


@given(ROWS)
def test_any_capacity_gives_scikit_learns_values(rows):
    scores, labels, groups, weights = arrays(rows)
    counted = weights > 0
    with init_distributed("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "WAITING", 0)
        found = collected(Predictions(capacity=4), scores, labels, groups, weights).metrics()
    scores, labels, groups, weights = (it[counted] for it in (scores, labels, groups, weights))
    assert found.rows == len(scores)
    if not 0 < labels.sum() < len(labels):
        assert math.isnan(found.auc)
        assert math.isnan(found.ne)
        assert math.isnan(found.gauc)
        return
    chance = 1 / (1 + np.exp(-scores))
    rate = np.full(len(labels), np.average(labels, weights=weights))
    loss = log_loss(labels, chance, sample_weight=weights)
    terms = len(labels)
    assert found.auc == rounded(roc_auc_score(labels, scores, sample_weight=weights), terms)
    assert found.logloss == rounded(loss, terms)
    assert found.ne == rounded(loss / log_loss(labels, rate, sample_weight=weights), terms)
    calibration = (chance * weights).sum() / weights[labels > 0].sum()
    assert found.calibration == rounded(calibration, terms)
    inside = [
        (weights[at].sum(), roc_auc_score(labels[at], scores[at], sample_weight=weights[at]))
        for at in (groups == group for group in np.unique(groups))
        if 0 < labels[at].sum() < at.sum()
    ]
    if inside:
        sizes, aucs = np.array(inside).T
        assert found.gauc == rounded(np.average(aucs, weights=sizes), terms)
    else:
        assert math.isnan(found.gauc)


def shared_out(capacity, skewed):
    """Metrics of fixed rows of which each rank holds a part, and of their slices."""
    predictions.WAITING = 100
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = many(1000)
    mine = np.arange(rank, 1000, size)
    if skewed:  # the last rank has all rows but one of each other
        mine = np.array([rank]) if rank < size - 1 else np.arange(size - 1, 1000)
    share = [column[mine] for column in columns]
    sliced = SlicedPredictions("hour", capacity)
    share_of_slices = [share[0], share[1], share[2] % 5, share[3]]
    return (
        collected(Predictions(capacity), *share).metrics(),
        dict(collected(sliced, *share_of_slices).metrics()),
    )


@pytest.mark.parametrize(
    ("ranks", "skewed"),
    [
        pytest.param(1, False, marks=pytest.mark.slow),
        (2, True),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_capacity_do_not_matter(ranks, skewed):
    scores, labels, groups, weights = many(1000)
    counted = weights > 0
    want = compute_metrics(scores[counted], labels[counted], groups[counted], weights[counted])
    for found, slices in run_ranks(shared_out, ranks, 150, skewed):
        assert asdict(found) == rounded(asdict(want), terms=want.rows)
        assert sorted(slices) == [0, 1, 2, 3, 4]
        assert sum(part.rows for part in slices.values()) == want.rows
        for value, part in slices.items():
            at = counted & (groups % 5 == value)
            auc = roc_auc_score(labels[at], scores[at], sample_weight=weights[at])
            assert part.auc == rounded(auc, terms=part.rows)
            loss = compute_metrics(scores[at], labels[at], groups[at], weights[at]).logloss
            assert part.logloss == rounded(loss, terms=part.rows)


@pytest.mark.usefixtures("alone", "small")
def test_rows_on_disk_take_no_memory_and_their_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = Predictions(capacity=500)
    collected(rows, *many(5000), batches=50)
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) >= 3 * 2 * 5
    assert rows._by_group._loose_rows <= 500
    assert rows.metrics().auc == rows.metrics().auc  # it may be asked again
    rows.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone", "small")
def test_one_score_for_all_needs_no_more_room():
    """Ties become two rows of a run, however many there are."""
    rows = Predictions(capacity=300)
    _, labels, _, _ = many(5000)
    same = np.zeros(5000)
    collected(rows, same, labels, same.astype(np.int64), same + 1, batches=50)
    assert sum(len(run) for run in rows._by_score.runs()) < 100
    assert rows.metrics().auc == 0.5


@pytest.mark.usefixtures("alone", "small")
def test_rows_can_be_saved_and_restored_after_they_were_sorted():
    scores, labels, groups, weights = many(400)
    first = collected(Predictions(capacity=50), scores, labels, groups, weights)
    second = Predictions()
    second.add_packed(first.rows())
    assert asdict(second.metrics()) == rounded(asdict(first.metrics()), terms=400)


@pytest.mark.usefixtures("alone")
def test_scores_that_are_no_numbers_give_no_number():
    found = collected(
        Predictions(), np.array([1.0, np.nan]), np.array([1.0, 0.0]), np.array([1, 1]), np.ones(2)
    ).metrics()
    assert all(math.isnan(value) for value in (found.auc, found.gauc, found.logloss, found.ne))


@pytest.mark.usefixtures("alone")
def test_a_feature_with_too_many_values_is_refused():
    columns = np.zeros(20_000), np.ones(20_000), np.arange(20_000), np.ones(20_000)
    with pytest.raises(TooManySlicesError, match=r"'item' has more than 10000 values.*coarser"):
        collected(SlicedPredictions("item"), *columns, batches=1).metrics()
