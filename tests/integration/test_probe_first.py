"""``model.hilomoe.probe_first``: a plain model is probed aside, and its run begins with experts."""

import json
import re
import shutil

import pytest
import torch

from tests.helpers.runs import read_lines, read_tensors, run_app, SMALL, train
from tests.integration.test_auto_routing import AUTO, decision_of, make_data
from tests.integration.test_tools import use
from torchrec_hilomoe.training.checkpoint.loading import OF_A_RANK
from torchrec_hilomoe.training.log.reading import read_probe
from torchrec_hilomoe.training.log.run_log import METRICS_FILE

STEPS = 40  # after which the plain model has learned what it can without an interaction
DECIDING = {"kind", "price", "age"}
FIRST = (
    *(option for option in AUTO if "probe_steps" not in option),
    "--model.hilomoe.probe_first=true",
    "--model.dropout=0",
    "--train.learning_rate=0.01",
    f"--train.max_steps={STEPS}",
)
NAMED = [option for option in FIRST if "route_by" not in option and "probe_first" not in option]
PLAIN = [option for option in FIRST if "hilomoe" not in option]


@pytest.fixture(scope="module")
def deciding(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "deciding", decided=True)


@pytest.fixture(scope="module")
def probed(deciding, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    train(out, *FIRST, f"--data.path={deciding}", "--checkpoint.every_steps=6")
    return out


def assert_same_model(ours, theirs):
    one, other = (read_tensors(run / "checkpoints" / f"step_{STEPS}") for run in (ours, theirs))
    names = [name for name in other if not name.startswith(OF_A_RANK)]
    assert set(names) == {name for name in one if not name.startswith(OF_A_RANK)}
    assert not [name for name in names if not torch.equal(one[name], other[name])]


def test_the_run_is_that_of_features_that_were_named(probed, deciding, tmp_path):
    found = decision_of(probed, 6)
    assert found is not None
    assert found.step == 0
    assert found.route_by is not None
    assert {name for layer in found.route_by for name in layer} <= DECIDING
    route_by = json.dumps([list(layer) for layer in found.route_by])
    train(tmp_path, *NAMED, f"--model.hilomoe.route_by={route_by}", f"--data.path={deciding}")
    assert_same_model(probed, tmp_path)


def test_it_finds_what_the_tool_finds(probed, deciding, tmp_path):
    report = tmp_path / "probe.json"
    code, shown = use("probe", *SMALL, *FIRST, f"--data.path={deciding}", "--json", report)
    assert code == 0, shown
    found, told = (read_probe(it) for it in (tmp_path, probed))
    assert told.pop("brought") is not None
    assert told.pop("verdict").startswith(found.pop("verdict"))
    assert told == found


@pytest.mark.parametrize("step", [6, pytest.param(36, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_and_probes_no_more(probed, deciding, step, tmp_path):
    kept = tmp_path / "checkpoints" / f"step_{step}"
    shutil.copytree(probed / "checkpoints" / f"step_{step}", kept)
    (ended,) = run_app(f"--out_dir={tmp_path}", *FIRST, f"--data.path={deciding}")
    assert ended.code == 0, ended.shown
    assert "probed first" not in ended.shown
    assert decision_of(tmp_path, STEPS) == decision_of(probed, STEPS)
    assert_same_model(probed, tmp_path)
    lines, again = (read_lines(run / METRICS_FILE) for run in (probed, tmp_path))
    assert again == [line for line in lines if line["step"] > step]


def test_where_nothing_decides_the_run_is_plain(tmp_path):
    data = f"--data.path={make_data(tmp_path / 'coins', decided=False)}"
    train(tmp_path / "auto", *FIRST, data)
    found = decision_of(tmp_path / "auto", STEPS)
    assert found is not None
    assert (found.step, found.route_by) == (0, None)
    train(tmp_path / "plain", *PLAIN, "--model.hilomoe=null", data)
    assert_same_model(tmp_path / "auto", tmp_path / "plain")


@pytest.mark.slow
def test_a_site_that_sees_too_few_events_to_judge_leaves_the_run_plain(tmp_path):
    data = make_data(tmp_path / "data", decided=True, with_history=20)
    train(tmp_path / "out", *FIRST, f"--data.path={data}", "--model.hilomoe.sites=[all]")
    found = decision_of(tmp_path / "out", STEPS)
    assert found is not None
    assert (found.step, found.route_by) == (0, None)
    assert found.verdict.startswith("cannot judge: site 'model.backbone.")


@pytest.mark.parametrize("later", [60, 40], ids=["looks again", "is old enough"])
def test_what_pays_early_must_pay_later(deciding, later, tmp_path):
    report = tmp_path / "probe.json"
    ages = ("--train.max_steps=80", "--steps=40", f"--later_steps={later}")
    code, shown = use("probe", *SMALL, *FIRST, f"--data.path={deciding}", *ages, "--json", report)
    assert code == 0, shown
    found = json.loads(report.read_text())
    assert found["route_by"][0][0] in DECIDING
    if later == 40:
        assert found["later"] is None
        return
    assert found["later"]["steps"] == 60
    assert ("It lasts" in shown) == found["pays"]
    assert ("nothing decides for long" in shown) != found["pays"]
    assert found["layers"][-1]["total"] > found["later"]["total"]


@pytest.mark.slow
def test_ranks_agree(deciding, tmp_path):
    train(tmp_path, *FIRST, f"--data.path={deciding}", ranks=2)
    found = decision_of(tmp_path, STEPS)
    assert found is not None
    assert found.route_by is not None
    assert found.route_by[0][0] in DECIDING


@pytest.mark.slow
def test_a_plain_models_checkpoint_is_what_is_probed(deciding, tmp_path):
    data = f"--data.path={deciding}"
    train(tmp_path / "plain", *PLAIN, "--model.hilomoe=null", "--train.max_steps=40", data)
    began = f"--init_from={tmp_path / 'plain' / 'checkpoints' / 'step_40'}"
    (ended,) = run_app(f"--out_dir={tmp_path / 'run'}", *FIRST, data, began)
    assert ended.code == 0, ended.shown
    found = decision_of(tmp_path / "run", STEPS)
    assert found is not None
    assert found.route_by is not None
    assert found.route_by[0][0] in DECIDING
    assert "stage probe" not in ended.shown


def test_nothing_is_gathered_in_steps_that_are_asked_for(deciding, tmp_path):
    asked = "--model.hilomoe.probe_steps=8"
    (ended,) = run_app(f"--out_dir={tmp_path}", *FIRST, asked, f"--data.path={deciding}")
    assert ended.code == 2
    assert "probe_first is true and probe_steps is 8" in ended.shown


def test_a_plain_model_that_breaks_is_not_probed(deciding, tmp_path):
    broken = (*FIRST, f"--data.path={deciding}", "--train.learning_rate=1e30")
    (ended,) = run_app(f"--out_dir={tmp_path}", *broken)
    code, shown = use("probe", *SMALL, *broken)
    for found, said in ((ended.code, ended.shown), (code, shown)):
        assert found == 1, said
        assert "error: the plain model that is probed broke: after step 40" in said
        assert "Lower train.learning_rate" in said


def test_the_plain_model_follows_the_stages_that_it_can(deciding, tmp_path):
    stages = [
        {"name": "experts", "steps": 5, "train_backbone": False, "train_tables": False},
        {"name": "tables", "steps": 5, "train_backbone": False},
        {"name": "all"},
    ]
    data = f"--data.path={deciding}"
    train(tmp_path, *FIRST, f"--train.stages={json.dumps(stages)}", data, "--train.max_steps=12")
    assert decision_of(tmp_path, 12) is not None


def test_a_checkpoint_with_experts_is_not_what_is_probed(probed, deciding, tmp_path):
    began = f"--init_from={probed / 'checkpoints' / 'step_40'}"
    (ended,) = run_app(f"--out_dir={tmp_path}", *FIRST, f"--data.path={deciding}", began)
    assert ended.code == 2
    assert "probed first" in ended.shown
    assert "trained aside" not in ended.shown
    assert re.search(
        "probe: --init_from .*in which experts compute.*leave --init_from", ended.shown
    )


def test_a_run_that_listens_does_not_go_on_as_one_that_probes_first(deciding, tmp_path):
    data = f"--data.path={deciding}"
    listens = [option for option in FIRST if "probe_first" not in option]
    listens.append("--model.hilomoe.probe_first=false")
    train(tmp_path / "on", *listens, data, "--checkpoint.every_steps=4")
    again = tmp_path / "again" / "checkpoints" / "step_4"
    shutil.copytree(tmp_path / "on" / "checkpoints" / "step_4", again)
    (ended,) = run_app(f"--out_dir={tmp_path / 'again'}", *FIRST, data)
    assert ended.code == 2
    assert "has not found its features before its first step" in ended.shown
    assert "--model.hilomoe.probe_first false" in ended.shown


def test_the_plain_model_is_not_compiled(deciding, monkeypatch):
    def refuse(self, *args, **options):
        raise AssertionError("hooks would not be heard, and the run's own graphs would be too many")

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    brief = ("--steps=4", "--later_steps=4", "--train.compile=true")
    code, shown = use("probe", *SMALL, *FIRST, f"--data.path={deciding}", *brief)
    assert code == 0, shown
