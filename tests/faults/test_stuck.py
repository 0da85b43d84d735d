"""A rank that is stuck, that fails, or that is killed: all end soon, and say where and why."""

import os
import re
import signal
import time

import pytest

from tests.helpers.faults import fail_with
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline

STEP = Pipeline.step


def in_third_step(act):
    """Let rank 1 do something in the middle of its third step."""
    steps = []

    def step(self, batches):
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            act()
        return STEP(self, batches)

    Pipeline.step = step


def get_stuck():
    def wait_for_ever():
        time.sleep(600)

    in_third_step(wait_for_ever)


def fail():
    def calculate():
        raise ArithmeticError("the answer is not 42")

    in_third_step(calculate)


def die():
    in_third_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def of_each_rank(shown):
    first, second = re.split(r"(?m)^rank 1 ", shown)
    return first, second


def test_a_stuck_rank_ends_the_run_and_every_rank_shows_where_it_stands(tmp_path):
    started = time.monotonic()
    shown = fail_with(get_stuck, [f"--out_dir={tmp_path}", "--stall_seconds=5"], ranks=2)
    assert time.monotonic() - started < 60
    for rank, text in enumerate(of_each_rank(shown)):
        assert f"error: rank {rank} has finished nothing for 5 s (stall_seconds)" in text
        assert "trainer.py" in text
        assert "in fit\n" in text
    assert "in wait_for_ever" in of_each_rank(shown)[1]


@pytest.mark.slow
def test_a_rank_that_is_stuck_while_a_plain_model_is_probed_first_is_told_of(tmp_path):
    probes = (
        "--model.hilomoe.route_by=auto",
        "--model.hilomoe.routing=sample",
        "--data.eval_rows=512",
    )
    options = [f"--out_dir={tmp_path}", "--stall_seconds=5", *probes]
    shown = fail_with(get_stuck, [*options, "--model.hilomoe.probe_first=true"], ranks=2)
    for rank, text in enumerate(of_each_rank(shown)):
        assert f"error: rank {rank} has finished nothing for 5 s (stall_seconds)" in text
        assert "in probe_run\n" in text
    assert "in wait_for_ever" in of_each_rank(shown)[1]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(fail, "ArithmeticError: the answer is not 42", marks=pytest.mark.slow),
        (die, "ended with exit code -9"),
    ],
)
def test_the_others_end_soon_when_a_rank_does_and_its_reason_is_shown(tmp_path, fault, reason):
    """The helper gives the others five seconds after the first has ended."""
    first, second = of_each_rank(fail_with(fault, [f"--out_dir={tmp_path}"], ranks=2))
    assert reason in second
    assert "rank 0 ended with exit code 1" in first
    (line,) = [line for line in first.splitlines() if "error: " in line]
    assert line.startswith("error: another rank has ended or does not answer, so this one ends")
    assert "Traceback" not in first
