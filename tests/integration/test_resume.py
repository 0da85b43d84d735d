"""N + N steps are 2N steps: stopped anywhere, a run ends with the bits of an uninterrupted one."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers.processes import RankFailed, ROOT
from tests.helpers.runs import (
    assert_same_metrics,
    load,
    read_lines,
    read_tensors,
    SMALL,
    train,
    train_and_signal,
    train_and_signal_in_validation,
)
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint.loading import OF_A_RANK
from torchrec_hilomoe.training.log.reading import METRICS_FILE, ROUTING_FILE


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, marks=pytest.mark.slow, id="one rank"),
        pytest.param(2, id="two ranks"),
    ],
)
def whole(request, tmp_path_factory):
    """An uninterrupted run with a checkpoint of every step, and its number of ranks."""
    out = tmp_path_factory.mktemp("whole")
    train(out, "--checkpoint.every_steps=1", ranks=request.param)
    return out, request.param


def assert_same_end(out, other, step=18):
    ours, theirs = (read_tensors(run / "checkpoints" / f"step_{step}") for run in (out, other))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    ends = [checkpoint.open(run / "checkpoints" / f"step_{step}").progress for run in (out, other)]
    assert ends[0] == ends[1]


def assert_same_lines(out, other, *, after):
    """What is logged later on, by windows that were open when the checkpoint was saved, too."""
    for name in (METRICS_FILE, ROUTING_FILE):
        ours, theirs = (read_lines(run / name) for run in (out, other))
        assert theirs == [line for line in ours if line["step"] > after]


# Inside the backbone's stage, at its end, at the end of an expert layer's, inside one (a step and
# two after a line of the log), and late.
@pytest.mark.parametrize(
    "step", [11, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5, 7, 10, 16))]
)
def test_resumed_equals_uninterrupted(whole, step, tmp_path):
    out, ranks = whole
    kept = tmp_path / "checkpoints" / f"step_{step}"
    shutil.copytree(out / "checkpoints" / f"step_{step}", kept)
    train(tmp_path, ranks=ranks)
    assert_same_end(out, tmp_path)
    assert_same_lines(out, tmp_path, after=step)


@pytest.mark.slow
def test_a_resume_reads_the_manifest_once(tmp_path):
    train(tmp_path, "--train.max_steps=2")
    manifest = tmp_path / "checkpoints" / "step_2" / "progress.json"
    flags = [*SMALL, "--train.max_steps=4", f"--out_dir={tmp_path}"]
    opened = subprocess.run(
        [sys.executable, "-c", COUNT_OPENED, str(manifest), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "opened 1 times" in opened.stdout


COUNT_OPENED = """
import sys
from torchrec_hilomoe.apps.train import main
manifest, opened = sys.argv.pop(1), []
def hook(event, given):
    if event == "open" and str(given[0]) == manifest:
        opened.append(given)
sys.addaudithook(hook)
main(sys.argv[1:])
print("opened", len(opened), "times")
"""


@pytest.mark.slow
def test_another_number_of_ranks_holds_the_same_tensors(whole):
    """Element by element: parameters, tables, and the state of every optimizer."""
    out, ranks = whole
    saved = read_tensors(out / "checkpoints" / "step_11")
    for others in {1, 2, 4} - {ranks}:
        loaded = load(out / "checkpoints" / "step_11", ranks=others)
        assert loaded.keys() == {name for name in saved if not name.startswith(OF_A_RANK)}
        for name, tensor in loaded.items():
            assert torch.equal(tensor, saved[name]), (others, name)


def test_another_number_of_ranks_goes_on(whole, tmp_path):
    """The batches are the same; only what dropout drops is not, so the end is nearly so."""
    out, ranks = whole
    train(tmp_path, f"--resume={out / 'checkpoints' / 'step_16'}", ranks=3 - ranks)
    ours, theirs = (validation_of(run) for run in (out, tmp_path))
    assert theirs["step"] == ours["step"] == 18
    # Both have gone on from the same step, so they are nearer to each other than to its start.
    assert abs(theirs["logloss"] - ours["logloss"]) < abs(ours["logloss"] - math.log(2))


def validation_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["split"] == "valid")


def start(out, *overrides):
    argv = [sys.executable, "apps/train.py", *SMALL, f"--out_dir={out}", *overrides]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_app_asked_to_stop_saves_and_ends_well(tmp_path):
    with start(tmp_path, "--checkpoint.every_steps=2") as process:
        wait_for(tmp_path / "checkpoints" / "step_2", process)
        os.kill(process.pid, signal.SIGTERM)
        _, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert "run again to go on" in shown
    stopped = checkpoint.latest(tmp_path / "checkpoints")
    assert stopped is not None
    assert 2 <= checkpoint.open(stopped).progress.step < 18


@pytest.mark.slow
def test_a_rank_asked_to_stop_stops_all_and_the_run_goes_on(whole, tmp_path):
    out, ranks = whole
    asked = {"rank": ranks - 1, "number": signal.SIGTERM, "step": 3}
    train_and_signal(tmp_path, "--checkpoint.every_steps=3", ranks=ranks, **asked)
    assert not (tmp_path / "summary.json").exists()
    stopped = checkpoint.latest(tmp_path / "checkpoints")
    assert stopped is not None
    assert 3 <= checkpoint.open(stopped).progress.step < 18
    train(tmp_path, ranks=ranks)
    assert_same_end(out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_asked_to_stop_in_a_validation_a_run_stops_there_and_validates_later(tmp_path, ranks):
    options = ("--train.max_steps=9", "--train.evaluate_every=6")
    out, other = tmp_path / "whole", tmp_path / "stopped"
    train(out, *options, ranks=ranks)
    asked = {"rank": ranks - 1, "number": signal.SIGTERM}
    train_and_signal_in_validation(other, *options, ranks=ranks, **asked)
    stopped = checkpoint.latest(other / "checkpoints")
    assert stopped is not None
    progress = checkpoint.open(stopped).progress
    assert (progress.step, progress.to_validate, progress.best) == (6, True, None)
    train(other, *options, ranks=ranks)
    assert_same_end(out, other, step=9)
    assert read_lines(other / METRICS_FILE) == read_lines(out / METRICS_FILE)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(whole, tmp_path):
    out, ranks = whole
    killed = {"rank": ranks - 1, "number": signal.SIGKILL, "step": 6}
    with pytest.raises(RankFailed, match=f"rank {ranks - 1} ended with exit code -9") as failed:
        train_and_signal(tmp_path, "--checkpoint.every_steps=3", ranks=ranks, **killed)
    if ranks > 1:  # the other ended by itself, in the few seconds that it was given, and said why
        assert re.search("(?s)rank 0 ended with exit code 1:.*Error", str(failed.value))
    assert not (tmp_path / "summary.json").exists()
    train(tmp_path, ranks=ranks)
    assert_same_end(out, tmp_path)


def test_a_finished_run_started_again_is_left_alone(whole):
    out, ranks = whole
    curves = out / "tensorboard"  # gets a file at every start
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and curves not in p.parents}
    train(out, ranks=ranks)
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_without_its_summary_gets_it(whole, tmp_path):
    """As when it was killed between its last checkpoint and its end."""
    out, _ = whole
    shutil.copytree(out / "checkpoints" / "step_18", tmp_path / "checkpoints" / "step_18")
    train(tmp_path)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (out, tmp_path))
    assert_same_metrics(theirs["test"], ours["test"], out / "checkpoints" / "step_18")
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["split"], row["stage"], row["step"]) == ("test", "finetune", 18)


def test_going_back_over_later_checkpoints_is_refused(whole):
    out, ranks = whole
    with pytest.raises(RankFailed, match=r"step 3, but .* already holds step 18"):
        train(out, f"--resume={out / 'checkpoints' / 'step_3'}", ranks=ranks)
