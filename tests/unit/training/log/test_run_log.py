"""The log of a run: one line a window, only of steps that count, on the first rank alone."""

import json
import math
import os
import re
import sys
import termios
import time
from contextlib import suppress

import pytest

from torchrec_hilomoe.hilomoe.monitor import LayerLoad
from torchrec_hilomoe.training.checkpoint import RoutingDecision, Saved
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.metrics import Metrics

METRICS = Metrics(auc=0.75, gauc=math.nan, logloss=0.5, ne=0.9, rows=64, calibration=1.25)


def fill(log, *steps):
    for step in steps:
        log.record(step=step, stage="all", split="train", metrics=METRICS, samples_per_second=8.0)
        log.routing(step, "all", [LayerLoad(router="a", layer=1, load=(0.5, 0.5), entropy=1.0)])


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    """Of the first rank, at the beginning."""
    log = RunLog(tmp_path, 100, 0, enabled=True)
    yield log
    log.close()


def test_a_report_that_is_lost_is_told_and_the_run_goes_on(log, tmp_path, caplog):
    decision = RoutingDecision(step=3, route_by=None, gains=(), verdict="nothing decides")
    log.goes_on(decision)
    assert not (tmp_path / "probe.json").exists()
    (tmp_path / "probe.json").write_text("{")
    with caplog.at_level("INFO", logger="torchrec_hilomoe"):
        log.goes_on(decision)
    assert "probe.json" in caplog.text
    assert (tmp_path / "probe.json").read_text() == "{"


def test_a_line_has_every_metric_and_null_where_there_is_none(log, tmp_path, caplog):
    with caplog.at_level("INFO", logger="torchrec_hilomoe"):
        fill(log, 10)
    (row,) = rows_of(tmp_path)
    assert row == {
        "step": 10,
        "stage": "all",
        "split": "train",
        "auc": 0.75,
        "gauc": None,
        "logloss": 0.5,
        "ne": 0.9,
        "rows": 64,
        "calibration": 1.25,
        "samples_per_second": 8.0,
    }
    assert "step 10/100 all train: auc 0.7500 logloss 0.5000 ne 0.9000 calibration" in caplog.text
    (routed,) = rows_of(tmp_path, "routing.jsonl")
    assert routed.items() >= {"step": 10, "router": "a", "layer": 1, "load": [0.5, 0.5]}.items()


def test_lines_after_the_checkpoint_are_cut_away(log, tmp_path):
    fill(log, 10, 20, 30)
    log.record(step=30, stage="all", split="valid", metrics=METRICS)
    log.record(step=30, stage="all", split="test", metrics=METRICS)
    with (tmp_path / "metrics.jsonl").open("a") as sink:
        sink.write('{"step": 40, "sta')  # killed while it wrote
    again = RunLog(tmp_path, 100, 30, enabled=True)
    again.cut_back()
    again.close()
    assert [(row["step"], row["split"]) for row in rows_of(tmp_path)] == [
        (10, "train"),
        (20, "train"),
        (30, "train"),
        (30, "valid"),
    ]
    earlier = RunLog(tmp_path, 100, 10, enabled=True)
    earlier.cut_back()
    earlier.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [10]
    assert [row["step"] for row in rows_of(tmp_path, "routing.jsonl")] == [10]


def drained(leader):
    """All that was shown on a terminal that is closed; one read gives a part of it."""
    shown = b""
    with suppress(OSError):  # as Linux says that there is no more
        while part := os.read(leader, 2**16):
            shown += part
    os.close(leader)
    return shown.decode()


def test_on_a_terminal_a_bar_says_where_training_is(tmp_path, monkeypatch):
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    with open(follower, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        log = RunLog(tmp_path, 100, 40, enabled=True)
        for _ in range(10):
            log.step("expert_warmup[1]")
        fill(log, 50)
        log.close()
    shown = drained(leader)
    assert re.search(
        r"expert_warmup\[1\]: .*50/100 \[\d+:\d+<[^,]+, .*loss 0.5000, auc 0.7500", shown
    )
    assert "8 samples/s" in shown


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path, 100, 0, enabled=False)
    log.cut_back()
    log.enter("all", 0, 100)
    log.step("all")
    fill(log, 10)
    log.close()
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn_where_tensorboard_looks(log, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    log.enter("all", 0, 100)
    fill(log, 10, 20)
    log.saved(Saved(path="x", step=20, bytes=2_000_000, stall_seconds=0.25, write_seconds=1.5))
    log.close()
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/auc", "train/samples_per_second", "checkpoint/stall_seconds"} <= tags
    assert {"router/a/layer1/entropy", "router/a/layer1/load/1"} <= tags
    assert "train/gauc" not in tags
    assert [event.step for event in events.Scalars("train/logloss")] == [10, 20]
    assert "stage/text_summary" in events.Tags()["tensors"]


def wait_for_the_next_second():
    """TensorBoard reads files by their names: the second, the process, and a number without zeros.

    Runs that follow each other do not begin in the same one; here number 10 would come before 9.
    """
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_curves_of_a_run_that_goes_on_have_each_step_once(log, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    fill(log, 10, 20, 30)
    log.close()
    wait_for_the_next_second()
    again = RunLog(tmp_path, 100, 20, enabled=True)
    again.close()  # as when it was refused: nothing before is lost
    wait_for_the_next_second()
    fill(again := RunLog(tmp_path, 100, 20, enabled=True), 25, 30)
    again.close()
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag in ("train/logloss", "router/a/layer1/entropy"):
        assert [event.step for event in events.Scalars(tag)] == [10, 20, 25, 30]
