"""Criteo, which has no histories: from its raw file to a trained model and its report."""

import json

import pytest

from tests.helpers.processes import run_ranks
from tests.helpers.raw_logs import criteo_rows, write_criteo
from tests.helpers.runs import run_app_here
from tests.integration.test_tools import evaluate, use
from torchrec_hilomoe.data.prepare.criteo import FIELDS, NUMBERS, prepare_criteo

ROWS, STEPS = 3000, 20
SMALL = (f"--train.max_steps={STEPS}", "--train.batch_size=64", "--train.device=cpu")
# The probe hears the last steps of the 13 before experts begin.
AUTO = (
    "--model.hilomoe.routing=sample",
    "--model.hilomoe.route_by=auto",
    "--model.hilomoe.num_experts=2",
    "--train.backbone_share=0.65",
)


def export(argv):
    return use("export", *argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data") / "criteo"
    write_criteo(raw / "train.txt", criteo_rows(ROWS))
    prepare_criteo(raw=str(raw), out=str(out))
    return out


@pytest.mark.parametrize(
    ("recipe", "options", "ranks"),
    [("dlrm-criteo", AUTO, 1), pytest.param("dcn-criteo", (), 2, marks=pytest.mark.slow)],
    ids=["dlrm, routing found", "dcn, two ranks"],
)
@pytest.mark.slow
def test_trains_evaluates_and_reports(data, tmp_path, recipe, options, ranks):
    pytest.importorskip("matplotlib")
    argv = ["--config", recipe, f"--data.path={data}", f"--out_dir={tmp_path}", *SMALL, *options]
    for ended in run_ranks(run_app_here, ranks, argv, joined=False):
        assert ended.code == 0, ended.shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["rows"] == ROWS // 10
    path, file = tmp_path / "checkpoints" / f"step_{STEPS}", tmp_path / "result.json"
    argv = [path, "--out", file, "--slice", "C6", "--device", "cpu"]
    ((code, shown),) = run_ranks(evaluate, 1, argv, joined=False)
    assert code == 0, shown
    result = json.loads(file.read_text())
    assert result["metrics"]["rows"] == sum(part["rows"] for part in result["slices"].values())
    code, shown = use("report", tmp_path)
    assert code == 0, shown
    page = (tmp_path / "report.html").read_text()
    if options:
        found = json.loads((tmp_path / "probe.json").read_text())
        assert {feature["name"] for feature in found["features"]} == {*NUMBERS, *FIELDS}
        assert ("DLRM with experts on criteo" in page) == found["pays"]
        assert "DLRM" in page
    else:
        assert "DCN-v2 with experts on criteo" in page
        argv = [path, "--out", tmp_path / "model", "--split", "test"]
        ((code, shown),) = run_ranks(export, 1, argv, joined=False)
        assert code == 0, shown
        assert f'"rows": {ROWS // 10}' in shown


@pytest.mark.slow
def test_the_probe_weighs_every_feature(data, tmp_path):
    file = tmp_path / "probe.json"
    argv = ["--config", "dcn-criteo", f"--data.path={data}", *SMALL[1:]]
    argv += ["--steps=12", "--fit_batches=10", "--draws=1", "--json", file]
    code, shown = use("probe", *argv)
    assert code == 0, shown
    features = json.loads(file.read_text())["features"]
    assert {feature["name"] for feature in features} == {*NUMBERS, *FIELDS}
