"""A run keeps the contract of its files."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.helpers.datasets import toy_table, write_folder
from tests.helpers.processes import ROOT
from tests.helpers.runs import run_app, train
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.training import checkpoint

METRICS = {"auc", "gauc", "logloss", "ne", "rows"}
COMPONENTS = {"tables", "backbone", "head", "experts", "routing", "total"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, "--checkpoint.every_steps=6", "--train.evaluate_every=9", ranks=2)
    return folder


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_configuration_is_kept_and_can_be_given_back(out):
    kept = parse_run(["--config", str(out / "config.yaml")]).config
    assert kept.out_dir == str(out)
    assert kept.train.max_steps == 18


def test_metrics_are_written_a_line_at_a_time(out):
    rows = lines(out)
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    for row in rows:
        assert METRICS | {"step", "stage", "split"} <= row.keys()
        assert row["logloss"] > 0
    training = [row for row in rows if row["split"] == "train"]
    # Every fourth step, and where a stage ends: a line belongs to one stage.
    assert [row["step"] for row in training] == [4, 5, 7, 8, 9, 12, 16, 18]
    assert all(row["samples_per_second"] > 0 for row in training)
    assert [row["step"] for row in rows if row["split"] == "valid"] == [9, 18]


def test_training_goes_on_after_a_validation_in_the_middle(out):
    """TorchRec's pipeline asks the outermost wrapper whether to train."""
    nine = {"step": 9, "split": "valid"}.items()
    last = {"step": 18, "split": "valid"}.items()
    rows = lines(out)
    (before,) = [row for row in rows if nine <= row.items()]
    (after,) = [row for row in rows if last <= row.items()]
    assert before["logloss"] != after["logloss"]


def test_summary_has_the_test_metrics_and_the_cost(out):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test"].keys() >= METRICS
    assert summary["test"]["rows"] == 512
    assert summary["test"]["auc"] < summary["best_auc"] < 1
    assert summary["parameters"].keys() == summary["flops"].keys() == COMPONENTS
    for counted in (summary["parameters"], summary["flops"]):
        parts = [figure for name, figure in counted.items() if name != "total"]
        assert sum(parts) == counted["total"] > 0
    assert math.isfinite(summary["samples_per_second"])
    stages = [stage["name"] for stage in summary["stages"]]
    assert stages[0] == "backbone_warmup"
    assert stages[1:-1] == [f"expert_warmup[{layer}]" for layer in (1, 2, 3)]
    assert stages[-1] == "finetune"


def test_checkpoints_and_curves_are_there(out):
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step_12",
        "step_18",
        "step_6",
    ]
    assert checkpoint.open(out / "checkpoints" / "step_12").progress.position.lane_rows == 96
    assert list((out / "tensorboard").iterdir())


def test_a_dry_run_counts_and_reads_no_data(tmp_path):
    (ended,) = run_app(f"--out_dir={tmp_path}", "--dry_run")
    assert ended.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "summary.json"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"{summary['parameters']['total']:,}" in ended.shown
    assert "test" not in summary


@pytest.mark.slow
def test_a_dry_run_without_a_folder_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "torchrec_hilomoe", "train", "--dry_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "dry run: nothing is written" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_published_count_needs_no_files(tmp_path):
    """DIN on AmazonElectronics_x1, as BARS has it; and the table says what each part costs."""
    flags = ["--config=din-amazon-electronics", "--model.hilomoe", "null", "--dry_run"]
    (ended,) = run_app(f"--out_dir={tmp_path}", *flags)
    assert ended.code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"]["total"] == 5_403_522
    shown = {line.split()[0]: line for line in ended.shown.splitlines() if line}
    for component in COMPONENTS:
        counts = (summary[kind][component] for kind in ("parameters", "flops"))
        assert all(f" {count:,} " in shown[component] for count in counts)


def test_a_plain_model_has_one_stage_and_no_experts(tmp_path):
    (ended,) = run_app(f"--out_dir={tmp_path}", "--model.hilomoe", "null")
    assert ended.code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"] == [{"name": "train", "start": 0, "stop": 18}]
    assert summary["parameters"]["experts"] == summary["flops"]["experts"] == 0


def test_a_prepared_folder_is_trained_on_for_its_epochs(tmp_path):
    """Every kind of column, two histories, files of uneven length, and a last batch cut short."""
    sizes = {"train": [70, 31], "valid": [20], "test": [33]}
    data = write_folder(
        tmp_path / "data",
        {split: [toy_table(rows) for rows in counts] for split, counts in sizes.items()},
    )
    flags = ["--train.max_steps=null", "--train.epochs=2", "--train.batch_size=16"]
    model = ["--model.embedding_dim=4", "--model.batch_norm=false"]
    for ended in run_app(f"--out_dir={tmp_path}", f"--data.path={data}", *flags, *model, ranks=2):
        assert ended.code == 0, ended.shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["rows"] == 33
    assert summary["steps"] == 2 * 7
    assert summary["best_auc"] is None  # of real clicks nobody knows it
