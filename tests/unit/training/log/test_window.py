"""The window of the log: its last rows, whatever was saved in between, and nothing that is NaN."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from torchrec_hilomoe.data.batch import Position
from torchrec_hilomoe.models.train_task import TaskOutput
from torchrec_hilomoe.training.log import window as window_module
from torchrec_hilomoe.training.log.window import NonFiniteLossError, Window
from torchrec_hilomoe.training.metrics import compute_metrics

pytestmark = pytest.mark.usefixtures("alone")


def output(step, rows=8, loss=0.5, padded=0):
    rng = torch.Generator().manual_seed(step)
    return TaskOutput(
        loss=torch.tensor(loss),
        logits=torch.randn(rows, generator=rng),
        labels=torch.randint(0, 2, (rows,), generator=rng).float(),
        weights=(torch.arange(rows) >= padded).float(),
        groups=torch.randint(0, 3, (rows,), generator=rng),
        mean_rows=float(rows),
        position=Position(epoch=0, lane_rows=step, lanes=1),
    )


def metrics_of(*steps, last=None):
    outputs = [output(step) for step in steps]
    names = ("logits", "labels", "groups")
    columns = [np.concatenate([getattr(it, name).numpy() for it in outputs]) for name in names]
    kept = [column[-(last or len(column)) :] for column in columns]
    return pytest.approx(asdict(compute_metrics(*kept)), nan_ok=True)


def test_a_window_is_of_its_own_steps_alone():
    window = Window()
    for step in (1, 2):
        window.add(step, output(step), 0.5)
    assert window.speed(since_start=False) == 16.0
    assert asdict(window.metrics()) == metrics_of(1, 2)
    window.add(3, output(3), 0.25)
    assert window.speed(since_start=False) == 32.0
    assert window.speed(since_start=True) == pytest.approx(24 / 1.25)
    assert asdict(window.metrics()) == metrics_of(3)


@pytest.mark.parametrize("most", [2**16, 44, 20, 3])
def test_a_window_goes_on_after_a_restore(monkeypatch, most):
    """Also where it forgets rows, some of which pad a batch."""
    monkeypatch.setattr(window_module, "METRIC_ROWS", most)
    first, second = Window(), Window()
    for step in range(1, 6):
        first.add(step, output(step, padded=step), 0.1)
    second.restore(first.rows())
    for step in range(6, 9):
        for window in (first, second):
            window.add(step, output(step), 0.1)
        assert torch.equal(first.rows(), second.rows())
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
    told = rf"loss is {loss} at step 2 on rank 0, .* Position\(epoch=0, lane_rows=2, lanes=1"
    with pytest.raises(NonFiniteLossError, match=told):
        window.check_finite()
