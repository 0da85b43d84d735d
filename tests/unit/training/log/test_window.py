"""The window of the log: its last rows, whatever was saved in between, and nothing that is NaN."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.helpers.rounding import rounded
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.log import window as window_module
from torchrec_hilomoe.training.log.window import Window
from torchrec_hilomoe.training.metrics import compute_metrics
from torchrec_hilomoe.training.non_finite import NonFiniteError

pytestmark = pytest.mark.usefixtures("alone")


def output(step, rows=8, loss=0.5, padded=0):
    rng = torch.Generator().manual_seed(step)
    return TaskOutput(
        loss=torch.tensor(loss),
        logits=torch.randn(rows, generator=rng),
        labels=torch.randint(0, 2, (rows,), generator=rng).float(),
        weights=(torch.arange(rows) >= padded).float(),
        grouping_keys=torch.randint(0, 3, (rows,), generator=rng),
        loss_denominator=float(rows),
        position=LoaderState(epoch=0, lane_rows=step, num_canonical_shards=1),
    )


def metrics_of(*steps, last=None):
    outputs = [output(step) for step in steps]
    names = ("logits", "labels", "grouping_keys")
    columns = [np.concatenate([getattr(it, name).numpy() for it in outputs]) for name in names]
    kept = [column[-(last or len(column)) :] for column in columns]
    return rounded(asdict(compute_metrics(*kept)), terms=len(kept[0]))


def test_a_window_is_of_its_own_steps_alone():
    window = Window()
    for step in (1, 2):
        window.add(step, output(step), 0.5)
    assert window.speed(since_start=False) == 16.0
    assert asdict(window.metrics()) == metrics_of(1, 2)
    window.add(3, output(3), 0.25)
    assert window.speed(since_start=False) == 32.0
    assert window.speed(since_start=True) == 24 / 1.25
    assert asdict(window.metrics()) == metrics_of(3)


@pytest.mark.parametrize("most", [2**16, 44, 20, 3])
def test_a_window_goes_on_in_a_resumed_run(monkeypatch, most):
    """Also where it forgets rows, some of which pad a batch."""
    monkeypatch.setattr(window_module, "METRIC_ROWS", most)
    first, second = Window(), Window()
    for step in range(1, 6):
        first.add(step, output(step, padded=step), 0.1)
    second.load_state_dict(first.state_dict())
    for step in range(6, 9):
        for window in (first, second):
            window.add(step, output(step), 0.1)
        assert torch.equal(first.state_dict()["window"], second.state_dict()["window"])
    assert repr(first.metrics()) == repr(second.metrics())


def test_of_many_rows_the_last_are_kept(monkeypatch):
    monkeypatch.setattr(window_module, "METRIC_ROWS", 20)
    window = Window()
    for step in range(1, 7):
        window.add(step, output(step), 0.1)
    assert asdict(window.metrics()) == metrics_of(4, 5, 6, last=20)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_found_with_its_place(loss):
    window = Window()
    window.add(1, output(1), 0.1)
    window.check_finite()
    window.add(2, output(2, loss=loss), 0.1)
    window.add(3, output(3, loss=math.nan), 0.1)
    place = r"LoaderState\(epoch=0, lane_rows=2, num_canonical_shards=1"
    told = rf"loss is {loss} at step 2 on rank 0, .* {place}"
    with pytest.raises(NonFiniteError, match=told):
        window.check_finite()


def test_a_norm_that_is_no_number_is_found_before_the_loss_that_follows():
    window = Window()
    window.add(1, output(1), 0.1, torch.tensor(3.0))
    window.add(2, output(2), 0.1, torch.tensor(math.inf))
    window.add(3, output(3, loss=math.nan), 0.1, torch.tensor(math.nan))
    told = r"the gradients' norm is inf at step 2 on rank 0, .* LoaderState\(epoch=0, lane_rows=2"
    with pytest.raises(NonFiniteError, match=told):
        window.check_finite()
