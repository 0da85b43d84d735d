"""The best validation: of whichever direction, and how long one has waited for a better."""

import math

from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.stages import PlateauConfig
from torchrec_hilomoe.training.stages.metric_tracker import MetricTracker


def metrics(auc):
    return Metrics(auc=auc, gauc=auc, logloss=1 - auc, ne=1 - auc, rows=1)


def observed(watch, *values):
    return [watch.observe(step, metrics(value)) for step, value in enumerate(values, start=1)]


def test_the_best_is_the_largest_auc_and_the_smallest_loss():
    for metric in ("auc", "gauc", "logloss", "ne"):
        watch = MetricTracker(PlateauConfig(metric=metric))
        assert observed(watch, 0.5, 0.625, math.nan, 0.625, 0.75, 0.7) == [
            True,
            True,
            False,
            False,
            True,
            False,
        ]
        assert watch.best is not None
        assert (watch.best.step, watch.best.validations_since) == (5, 1)


def test_patience_ends_only_after_validations_in_a_row():
    watch = MetricTracker(PlateauConfig(metric="auc", patience=2))
    observed(watch, 0.5, 0.4, 0.6, 0.55)
    assert not watch.exhausted
    watch.observe(5, metrics(0.6))
    assert watch.exhausted


def test_what_was_waited_for_goes_on_in_a_resumed_run():
    first = MetricTracker(PlateauConfig(metric="auc", patience=2))
    observed(first, 0.5, 0.4)
    second = MetricTracker(PlateauConfig(metric="auc", patience=2))
    second.load_state_dict(first.state_dict())
    second.observe(3, metrics(0.45))
    assert second.exhausted
    other = MetricTracker(PlateauConfig(metric="logloss", patience=2))
    other.load_state_dict(first.state_dict())
    assert other.best is None


def test_without_a_metric_nothing_is_followed():
    watch = MetricTracker(None)
    assert observed(watch, 0.5, 0.6) == [False, False]
    assert watch.best is None
    assert not watch.exhausted
