"""What one does with a run afterwards: evaluate a checkpoint of it, and look at it."""

import argparse
import contextlib
import io
import json
import re
import runpy
import sys

import pytest

from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.runs import assert_same_metrics, train
from torchrec_hilomoe.apps.evaluate import show
from torchrec_hilomoe.training.evaluation import Evaluation
from torchrec_hilomoe.training.metrics import Metrics
from torchrec_hilomoe.training.page.pictures import PANELS

SPLIT_ROWS = 512  # of the small run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, "--checkpoint.every_steps=9", ranks=2)
    return folder


def use(app, *argv):
    """Run an app in this process, which may be a rank; return its exit code and what it showed."""
    sys.argv = [f"apps/{app}.py", *map(str, argv)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.redirect_stderr(io.StringIO()) as told,
    ):
        try:
            runpy.run_path(str(ROOT / "apps" / f"{app}.py"), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), shown.getvalue() + told.getvalue()
    raise AssertionError("the app did not end with an exit code")


def evaluate(argv):
    return use("evaluate", *argv)


def test_a_checkpoint_evaluates_to_the_run_and_its_slices_add_up(out, tmp_path):
    """On another number of ranks than it was trained on, from the checkpoint's own folder."""
    path, file = out / "checkpoints" / "step_18", tmp_path / "result.json"
    pytest.importorskip("matplotlib")
    argv = [path, "--out", file, "--slice", "hour", "--device", "cpu", "--plots", tmp_path]
    ((code, shown),) = run_ranks(evaluate, 1, argv, joined=False)
    assert code == 0, shown
    result = json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    summary = json.loads((out / "summary.json").read_text())
    assert result["step"] == 18
    assert_same_metrics(result["metrics"], summary["test"], path)
    slices = result["slices"].values()
    assert sum(part["rows"] for part in slices) == SPLIT_ROWS
    loss = sum(part["logloss"] * part["rows"] for part in slices) / SPLIT_ROWS
    assert loss == rounded(result["metrics"]["logloss"], terms=SPLIT_ROWS)
    sites = [site["name"] for site in result["routing"]["sites"]]
    assert sites
    assert {path.name for path in tmp_path.glob("*.png")} == {f"routing-{s}.png" for s in sites}


def test_nothing_to_draw_is_said(tmp_path, capsys):
    metrics = Metrics(auc=0.5, gauc=0.5, logloss=0.7, ne=1.0, rows=1)
    arguments = argparse.Namespace(split="test", out=None, plots=tmp_path / "plots")
    show(Evaluation(step=1, metrics=metrics, routing=None), arguments)
    assert "drew nothing: no expert computes" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_slice_of_lists_is_refused(out):
    argv = [out / "checkpoints" / "step_18", "--device", "cpu", "--slice", "interest"]
    ((code, shown),) = run_ranks(evaluate, 1, argv, joined=False)
    assert code == 2
    assert re.search(r"error: slice is 'interest', but .*hour", shown)


def test_a_run_becomes_a_page(out, tmp_path):
    pytest.importorskip("matplotlib")
    code, shown = use("report", out)
    assert (code, shown.strip()) == (0, str(out / "report.html"))
    page = (out / "report.html").read_text()
    rows = map(json.loads, (out / "routing.jsonl").read_text().splitlines())
    sites = {row["router"] for row in rows}
    assert sites
    trained = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves = {name for row in trained for name in PANELS if row.get(name) is not None}
    assert page.count("<img") == len(curves) + len(sites)
    assert "expert_warmup[3]" in page
    code, shown = use("report", tmp_path)
    assert code == 2
    assert shown.startswith("error: there is no run in")
