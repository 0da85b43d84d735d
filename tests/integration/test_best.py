"""The best validation: saved, kept, tested; and a run that stops when nothing gets better."""

import json

import pytest

from tests.helpers.runs import run_app
from torchrec_hilomoe.training import checkpoint

# A rate this high spoils the model after a while, so that the best validation is not the last.
SPOILED = (
    "--train.stages=[{name: all}]",
    "--train.max_steps=24",
    "--train.evaluate_every=2",
    "--train.learning_rate=0.3",
    "--train.decay.kind=constant",
    "--train.warmup_steps=0",
    "--model.batch_norm=false",
    "--checkpoint.every_steps=4",
    "--checkpoint.keep=1",
    "--checkpoint.best=logloss",
)


def rows_of(out, split):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    for ended in run_app(f"--out_dir={folder}", *SPOILED, ranks=2):
        assert ended.code == 0, ended.shown
    return folder


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_newest_and_is_tested(out):
    valid = rows_of(out, "valid")
    best = min(valid, key=lambda row: row["logloss"])
    assert 2 <= best["step"] < 24, "the run was not spoiled"
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    assert kept == {f"step_{best['step']}", "step_24"}
    saved = checkpoint.open(out / "checkpoints" / "step_24").progress.best
    assert saved is not None
    assert (saved.metric, saved.value, saved.step) == ("logloss", best["logloss"], best["step"])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["tested_step"]) == (24, best["step"])
    (test,) = rows_of(out, "test")
    assert test["step"] == best["step"]
    assert test["logloss"] < valid[-1]["logloss"]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.slow
def test_a_run_stops_when_validations_no_longer_improve(out, tmp_path, resumed):
    """Also when it is gone on with: what it waited for so far is part of a checkpoint."""
    flags = ["--train.early_stopping.metric=logloss", "--train.early_stopping.patience=3"]
    best = min(rows_of(out, "valid"), key=lambda row: row["logloss"])["step"]
    if resumed:
        cut = [f"--train.max_steps={best + 4}", f"--out_dir={tmp_path}", *flags]
        (ended,) = run_app(*SPOILED[:1], *SPOILED[2:], *cut)
        assert ended.code == 0, ended.shown
        (tmp_path / "summary.json").unlink()
    (ended,) = run_app(*SPOILED, f"--out_dir={tmp_path}", *flags)
    assert ended.code == 0, ended.shown
    assert rows_of(tmp_path, "valid")[-1]["step"] == best + 6
    assert f"stopping at step {best + 6}" in ended.shown
    (again,) = run_app(*SPOILED, f"--out_dir={tmp_path}", *flags)
    assert "is complete" in again.shown


def test_early_stopping_needs_validations(tmp_path):
    (ended,) = run_app(f"--out_dir={tmp_path}", "--train.early_stopping.patience=3")
    assert ended.code == 2
    assert "train.early_stopping is given, but train.evaluate_every is null" in ended.shown
