"""N + N steps are 2N steps: stopped anywhere, a run ends with the bits of an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers.processes import ROOT
from tests.helpers.runs import read_tensors, SMALL, train
from torchrec_hilomoe.training import checkpoint


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def whole(request, tmp_path_factory):
    """An uninterrupted run with a checkpoint of every step, and its number of ranks."""
    out = tmp_path_factory.mktemp("whole")
    train(out, "--checkpoint.every_steps=1", ranks=request.param)
    return out, request.param


def assert_same_end(out, other):
    ours, theirs = (read_tensors(run / "checkpoints" / "step_18") for run in (out, other))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    ends = [checkpoint.read_progress(run / "checkpoints" / "step_18") for run in (out, other)]
    assert ends[0] == ends[1]


# At the end of the backbone's stage, inside the experts' stages, at their end; early and late.
SLOW = [pytest.param(step, marks=pytest.mark.slow) for step in (3, 16)]


@pytest.mark.parametrize("step", [5, 7, 11, *SLOW])
def test_resumed_equals_uninterrupted(whole, step, tmp_path):
    out, ranks = whole
    kept = tmp_path / "checkpoints" / f"step_{step}"
    shutil.copytree(out / "checkpoints" / f"step_{step}", kept)
    train(tmp_path, ranks=ranks)
    assert_same_end(out, tmp_path)


def test_a_checkpoint_fills_another_number_of_ranks(whole, tmp_path):
    """Element by element: at the first save after resuming there, nothing has been trained."""
    out, ranks = whole
    saved = out / "checkpoints" / "step_18"
    train(tmp_path, f"--resume={saved}", "--train.max_steps=19", ranks=3 - ranks)
    assert checkpoint.read_progress(tmp_path / "checkpoints" / "step_19").step == 19
    before, after = read_tensors(saved), read_tensors(tmp_path / "checkpoints" / "step_19")
    ours = {name for name in before if not name.startswith("rng.")}
    assert ours == {name for name in after if not name.startswith("rng.")}
    steps = [name for name in ours if name.endswith(".step")]
    assert steps
    assert all(after[name] == before[name] + 1 for name in steps)


def start(out, *overrides):
    argv = [sys.executable, "apps/train.py", *SMALL, f"--out_dir={out}", *overrides]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_at_any_moment_it_goes_on(whole, tmp_path):
    out, ranks = whole
    if ranks > 1:
        pytest.skip("one process is killed here; launchers kill the others")
    with start(tmp_path, "--checkpoint.every_steps=1") as process:
        wait_for(tmp_path / "checkpoints" / "step_4", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    train(tmp_path)
    assert_same_end(out, tmp_path)


def test_asked_to_stop_it_saves_and_ends_well(whole, tmp_path):
    out, ranks = whole
    if ranks > 1:
        pytest.skip("several ranks agree on the step in tests/unit/runtime/test_stopping.py")
    with start(tmp_path, "--checkpoint.every_steps=2") as process:
        wait_for(tmp_path / "checkpoints" / "step_2", process)
        os.kill(process.pid, signal.SIGTERM)
        _, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert "run again to go on" in shown
    stopped = checkpoint.latest(tmp_path / "checkpoints")
    assert stopped is not None
    assert 2 <= checkpoint.read_progress(stopped).step < 18
    train(tmp_path)
    assert_same_end(out, tmp_path)


def test_a_finished_run_started_again_is_left_alone(whole):
    out, ranks = whole
    before = {path: path.read_bytes() for path in out.glob("*.*") if path.is_file()}
    train(out, ranks=ranks)
    assert {path: path.read_bytes() for path in out.glob("*.*") if path.is_file()} == before
