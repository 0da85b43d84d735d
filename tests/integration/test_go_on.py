"""A run that is complete, or best elsewhere, goes on: with more steps, in another folder."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.runs import run_app, SMALL, train
from tests.integration.test_auto_routing import AUTO, BEGIN, decision_of, make_data
from torchrec_hilomoe.training.log.reading import read_summary

STAGED = (
    "--train.max_steps=12",
    "--train.evaluate_every=6",
    "--checkpoint.best=logloss",
    "--train.learning_rate=0.01",
    "--model.batch_norm=false",
    "--model.dropout=0",
)
# Nothing is learned, so that no later step is better.
STILL = ("--train.learning_rate=1e-30", "--train.table_learning_rate=1e-30")


def rows_of(out, split):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "deciding", decided=True)


def scores_of(row):
    return {name: row[name] for name in ("auc", "gauc", "logloss", "ne", "calibration")}


def test_with_more_steps_no_stage_comes_back_and_the_best_is_tested_as_it_was(tmp_path):
    train(tmp_path, *STAGED)
    (first,) = rows_of(tmp_path, "test")
    before = read_summary(tmp_path)["stages"]
    (ended,) = run_app(f"--out_dir={tmp_path}", *STAGED, "--train.max_steps=40", *STILL)
    assert ended.code == 0, ended.shown
    assert "step_12: logloss" in ended.shown
    changed = "train.max_steps 40 (was 12), train.learning_rate 1e-30 (was 0.01)"
    assert f"options that are others now: {changed}" in " ".join(ended.shown.split())
    second = rows_of(tmp_path, "test")[-1]
    assert (second["step"], second["stage"]) == (12, "finetune")
    assert scores_of(second) == scores_of(first)
    after = read_summary(tmp_path)["stages"]
    assert after[:-1] == before[:-1]
    assert after[-1] == {**before[-1], "stop": 40}


def test_in_another_folder_the_best_is_found_where_it_was_saved(tmp_path):
    train(tmp_path / "first", *STAGED)
    there = tmp_path / "first" / "checkpoints" / "step_12"
    options = (f"--resume={there}", f"--out_dir={tmp_path / 'second'}")
    (ended,) = run_app(*STAGED, "--train.max_steps=16", *STILL, *options)
    assert ended.code == 0, ended.shown
    assert f"testing {there}: logloss" in ended.shown
    assert read_summary(tmp_path / "second")["tested_step"] == 12


@pytest.mark.slow
def test_a_best_step_that_was_not_kept_is_told(tmp_path):
    train(tmp_path / "first", *STAGED)
    last, there = (tmp_path / it / "checkpoints" / "step_12" for it in ("first", "moved"))
    there.parent.mkdir(parents=True)
    last.rename(there)
    options = (f"--resume={there}", f"--out_dir={tmp_path / 'second'}")
    more = ("--train.max_steps=16", "--checkpoint.every_steps=2", *STILL)
    (ended,) = run_app(*STAGED, "--train.max_steps=14", *more[1:], *options)
    assert ended.code == 0, ended.shown
    later = tmp_path / "second" / "checkpoints" / "step_14"
    options = (f"--resume={later}", f"--out_dir={tmp_path / 'third'}")
    (ended,) = run_app(*STAGED, *more, *options)
    assert ended.code == 0, ended.shown
    assert re.search(r"after step 12, was not kept; step 16 is tested", ended.shown)
    assert read_summary(tmp_path / "third")["tested_step"] == 16


@pytest.mark.slow
def test_what_may_be_missing_may_be_missing_of_the_best_too(tmp_path):
    train(tmp_path, *STAGED)
    options = ("--train.optimizer=sgd", "--allow_missing=[optimizer.*]", "--train.max_steps=16")
    (ended,) = run_app(f"--out_dir={tmp_path}", *STAGED, *options, *STILL)
    assert ended.code == 0, ended.shown
    assert read_summary(tmp_path)["tested_step"] == 12


@pytest.mark.slow
def test_a_run_that_validations_ended_says_what_lets_it_go_on(tmp_path):
    patient = "--train.early_stopping.patience"
    stops = ("--train.evaluate_every=2", "--train.early_stopping.min_delta=0.4")
    alone = ("--train.backbone_share=0", "--train.frozen_share=0", f"--out_dir={tmp_path}")
    (ended,) = run_app(*stops, *alone, f"{patient}=1")
    assert "stopping at step 4" in ended.shown
    (ended,) = run_app(*stops, *alone, f"{patient}=1", "--train.max_steps=40")
    assert f"raise {patient.removeprefix('--')}, or give another --out_dir" in ended.shown
    (ended,) = run_app(*stops, *alone, f"{patient}=2")
    assert "stopping at step 6" in ended.shown


PLATEAU = (
    "--train.stages=[{name: plain, steps: 8, active_layers: 0}, {name: warm, steps: 8, "
    "train_backbone: false, train_tables: false, plateau: {metric: auc, patience: 1, "
    "min_delta: 0.5}}, {name: rest}]"
)


def test_experts_are_confirmed_where_a_plateau_ends_their_warm_up(data, tmp_path):
    options = ("--train.evaluate_every=2", "--train.max_steps=22", "--checkpoint.every_steps=1")
    train(tmp_path, *AUTO, f"--data.path={data}", PLATEAU, *options)
    warm = read_summary(tmp_path)["stages"][1]
    assert (warm["name"], warm["start"]) == ("warm", 8)
    assert warm["stop"] < 16, "the plateau did not end it"
    for step, known in ((warm["stop"] - 1, False), (warm["stop"], True), (22, True)):
        found = decision_of(tmp_path, step)
        assert found is not None
        assert (found.brought is not None) == known, step


BEFORE = (
    "--checkpoint.best=logloss",
    "--train.evaluate_every=5",
    "--train.stages=[{name: a, steps: 10, active_layers: 0}, {name: b, lr_scale: 100}]",
)


@pytest.mark.parametrize("routing", ["sample", pytest.param("random", marks=pytest.mark.slow)])
def test_a_test_of_a_step_before_experts_is_not_told_as_theirs(data, routing, tmp_path):
    options = (*AUTO, f"--data.path={data}", *BEFORE, f"--model.hilomoe.routing={routing}")
    (ended,) = run_app(f"--out_dir={tmp_path}", *options)
    assert ended.code == 0, ended.shown
    summary = read_summary(tmp_path)
    assert summary["tested_step"] == 10, "the run was not spoiled"
    assert summary["parameters"]["experts"] == 0
    assert summary["route_by"]["route_by"] is not None
    assert "the best validation was before experts began" in ended.shown


@pytest.mark.slow
def test_a_run_that_was_too_short_finds_features_when_it_goes_on(data, tmp_path):
    stages = "--train.stages=[{name: plain, steps: 10, active_layers: 0}, {name: rest}]"
    options = (*AUTO, f"--data.path={data}", stages)
    train(tmp_path / "short", *options, "--train.max_steps=10")
    found = decision_of(tmp_path / "short", 10)
    assert found is not None
    assert "Train for more steps" in found.verdict
    (ended,) = run_app(f"--out_dir={tmp_path / 'short'}", *options, "--train.max_steps=14")
    assert ended.code == 0, ended.shown
    assert "the model stays plain, as was decided of the shorter run" in ended.shown
    train(tmp_path / "shorter", *options, "--train.max_steps=10", "--checkpoint.every_steps=1")
    for step in range(2, 11):
        folder = tmp_path / "shorter" / "checkpoints" / f"step_{step}"
        folder.rename(tmp_path / f"later_{step}")
    train(tmp_path / "shorter", *options, "--train.max_steps=14")
    found = decision_of(tmp_path / "shorter", 14)
    assert found is not None
    assert (found.step, found.route_by is not None) == (BEGIN, True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_plain_model_is_probed_ends_the_run_well(data, number, tmp_path):
    options = [option for option in AUTO if "probe_steps" not in option]
    options += [f"--data.path={data}", "--model.hilomoe.probe_first=true", f"--out_dir={tmp_path}"]
    command = [sys.executable, "apps/train.py", *SMALL, *options, "--train.max_steps=600"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        shown = ""
        while "probed first" not in shown:
            line = process.stderr.readline()
            assert line, shown
            shown += line
        time.sleep(2)  # until it trains the plain model
        process.send_signal(number)
        shown += process.stderr.read()
    assert process.returncode == 0, shown
    assert "stopped while a plain model was probed; run again to begin anew" in shown
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{name: a, active_layers: 9}]", "active_layers names layer 9, but site"),
        ("[{name: a, steps: 30}, {name: b}]", "the stages cover 30 steps, but the run has 18"),
    ],
)
def test_a_dry_run_refuses_stages_that_cannot_be(stages, message):
    (ended,) = run_app("--dry_run=true", f"--train.stages={stages}")
    assert ended.code == 2
    assert message in " ".join(ended.shown.split()), ended.shown
