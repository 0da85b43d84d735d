"""What experts that a run has found brought in their warm-up; a loss takes them out again."""

import json
import shutil
import time
from dataclasses import asdict

import pytest
import torch

from tests.helpers.faults import run_with
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.runs import read_lines, read_tensors, run_app, train
from tests.integration import test_auto_routing
from tests.integration.test_auto_routing import AUTO, BEGIN, make_data, STEPS
from tests.integration.test_tools import evaluate
from torchrec_hilomoe.training.auto_routing import confirming, routing
from torchrec_hilomoe.training.log.reading import read_probe
from torchrec_hilomoe.training.log.run_log import METRICS_FILE, ROUTING_FILE

ASKED = 13  # experts alone learn in steps 10 to 12
HARMFUL = "--train.expert_lr_scale=20000"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "deciding", decided=True)


def decision_of(out, step: int = STEPS):
    decision = test_auto_routing.decision_of(out, step)
    assert decision is not None
    return decision


def brought_in(out, step: int = STEPS):
    brought = decision_of(out, step).brought
    assert brought is not None
    return brought


def options(data):
    return (*AUTO, f"--data.path={data}", "--checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept")
    train(out, *options(data))
    return out


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one rank", "two ranks"],
)
def lost(request, data, tmp_path_factory):
    """A run whose experts harm, and its number of ranks."""
    out = tmp_path_factory.mktemp("lost")
    train(out, *options(data), HARMFUL, ranks=request.param)
    return out, request.param


def logloss_of(out, step, file, ranks=1):
    argv = [out / "checkpoints" / f"step_{step}", "--split", "valid", "--out", file]
    ended = run_ranks(evaluate, ranks, [*argv, "--device", "cpu"], joined=False)
    assert [code for code, _ in ended] == [0] * ranks, ended
    return json.loads(file.read_text())["metrics"]["logloss"]


def test_what_they_brought_is_the_difference_between_two_checkpoints(kept, tmp_path):
    """Nothing else learned in between, so the one before experts is the model without them."""
    found = brought_in(kept)
    assert (found.step, found.rows) == (ASKED, 2048)
    without, with_experts = (
        logloss_of(kept, step, tmp_path / f"{step}.json") for step in (BEGIN, ASKED)
    )
    difference = rounded(without - with_experts, found.rows, scale=max(without, with_experts))
    assert found.gain == difference
    assert found.low < found.gain < found.high
    assert found.low > 0  # it is what the data were made for
    assert "Experts brought 0.0" in decision_of(kept).verdict
    assert json.loads((kept / "summary.json").read_text())["route_by"]["brought"]["rows"] == 2048
    assert_probe_tells(kept)


def test_it_does_not_change_the_run(kept, data, tmp_path):
    train(tmp_path, *options(data), "--model.hilomoe.confirm=false")
    assert decision_of(tmp_path).brought is None
    ours, theirs = (read_tensors(out / "checkpoints" / f"step_{STEPS}") for out in (kept, tmp_path))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert read_lines(kept / METRICS_FILE) == read_lines(tmp_path / METRICS_FILE)


def assert_probe_tells(out):
    """What was predicted, and what was made of it."""
    told, decision = read_probe(out), decision_of(out)
    assert told["features"][0]["name"] == "kind"
    assert told["route_by"][0] == ["kind"]
    assert told["pays"] == (decision.route_by is not None)
    assert told["verdict"] == decision.verdict
    assert told["brought"] == asdict(brought_in(out))


def test_experts_that_harm_are_taken_out(lost):
    out, _ = lost
    before, after = decision_of(out, ASKED - 1), decision_of(out, ASKED)
    assert before.route_by is not None
    assert after == decision_of(out)
    assert (after.route_by, after.step, brought_in(out).step) == (None, BEGIN, ASKED)
    assert brought_in(out).high < 0
    assert after.verdict.startswith("experts were taken out again: routed by kind")
    names = read_tensors(out / "checkpoints" / f"step_{ASKED}")
    assert not [name for name in names if "expert" in name or "router" in name]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["parameters"]["experts"] == 0
    assert_probe_tells(out)
    spans = [(stage["name"], stage["start"], stage["stop"]) for stage in summary["stages"]]
    assert spans[0] == ("backbone_warmup", 0, BEGIN)
    assert spans[-1] == ("finetune", ASKED, STEPS)
    assert all(name.startswith("expert_warmup") for name, _, _ in spans[1:-1])


def test_the_model_without_them_is_the_one_from_before_and_learns_again(lost, tmp_path):
    out, ranks = lost
    without, harmed, plain = (
        logloss_of(out, step, tmp_path / f"{step}.json", ranks)
        for step in (BEGIN, ASKED - 1, ASKED)
    )
    assert harmed > without == plain
    last = read_lines(out / METRICS_FILE)[-1]
    assert (last["stage"], last["split"]) == ("finetune", "test")
    assert last["logloss"] < harmed


def test_a_longer_run_goes_on_without_them(lost, data, tmp_path):
    """Its stages lie elsewhere: it has steps for experts alone where it has lost them."""
    out, ranks = lost
    name = f"checkpoints/step_{ASKED}"
    shutil.copytree(out / name, tmp_path / name)
    train(tmp_path, *options(data), HARMFUL, "--train.max_steps=22", ranks=ranks)
    assert decision_of(tmp_path, 22) == decision_of(out)


def test_a_validation_of_experts_in_their_warmup_is_never_the_best(data, tmp_path):
    """These help at first, and then harm; what follows learns too fast to be better again."""
    frozen = "train_backbone: false, train_tables: false"
    stages = (
        "[{name: a, steps: 10, active_layers: 0}, "
        f"{{name: b, steps: 2, {frozen}, expert_lr_scale: 5}}, "
        f"{{name: c, steps: 1, {frozen}, expert_lr_scale: 200000}}, "
        "{name: d, lr_scale: 300}]"
    )
    best = ("--checkpoint.best=logloss", "--train.evaluate_every=1")
    train(tmp_path, *options(data), f"--train.stages={stages}", *best)
    assert decision_of(tmp_path).route_by is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    valid = {
        line["step"]: line["logloss"]
        for line in read_lines(tmp_path / METRICS_FILE)
        if line["split"] == "valid"
    }
    assert valid[12] < valid[BEGIN] == valid[ASKED] < valid[STEPS]
    assert summary["tested_step"] == BEGIN


def test_what_learned_together_is_not_judged(data, tmp_path):
    stages = (
        "[{name: a, steps: 10, active_layers: 0}, {name: b, steps: 3, expert_lr_scale: 2000}, "
        "{name: c, steps: 2, train_backbone: false, train_tables: false}, {name: d}]"
    )
    train(tmp_path, *options(data), f"--train.stages={stages}")
    assert decision_of(tmp_path).brought is None


@pytest.mark.parametrize("step", [ASKED, ASKED + 1, pytest.param(12, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(lost, data, step, tmp_path):
    out, ranks = lost
    name = f"checkpoints/step_{step}"
    shutil.copytree(out / name, tmp_path / name)
    promised = {**read_probe(out), "pays": True, "verdict": "experts should pay", "brought": None}
    (tmp_path / "probe.json").write_text(json.dumps(promised))
    train(tmp_path, *options(data), HARMFUL, ranks=ranks)
    assert_probe_tells(tmp_path)
    ours, theirs = (read_tensors(run / f"checkpoints/step_{STEPS}") for run in (out, tmp_path))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert decision_of(tmp_path) == decision_of(out)
    for file in (METRICS_FILE, ROUTING_FILE):
        lines, again = (read_lines(run / file) for run in (out, tmp_path))
        assert again == [line for line in lines if line["step"] > step]


def score_slowly():
    losses = confirming._losses

    def wait_and_score(*args):
        time.sleep(0.5)
        return losses(*args)

    confirming._losses = wait_and_score


@pytest.mark.slow
def test_a_long_look_is_not_taken_for_a_stuck_rank(data, tmp_path):
    """Eight batches, scored twice, take eight seconds."""
    argv = [f"--out_dir={tmp_path}", *options(data), "--stall_seconds=4"]
    argv += ["--train.stages=null", "--train.max_steps=18", "--model.hilomoe.num_layers=3"]
    (ended,) = run_with(score_slowly, argv, ranks=1)
    assert ended.code == 0, ended.shown
    assert brought_in(tmp_path).rows == 2048


def confirm_by_600_rows() -> None:
    routing.WANTED_ROWS = 600


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_are_asked_of_as_many_rows_as_one_process(ranks, data, tmp_path):
    argv = [f"--out_dir={tmp_path}", *options(data), "--train.stages=null"]
    argv += ["--train.max_steps=18", "--model.hilomoe.num_layers=3"]
    for ended in run_with(confirm_by_600_rows, argv, ranks=ranks):
        assert ended.code == 0, ended.shown
    assert brought_in(tmp_path).rows == 3 * 256


@pytest.mark.slow
def test_a_compiled_run_loses_them_too(data, tmp_path):
    out = tmp_path / "compiled"
    train(out, *options(data), HARMFUL, "--train.compile=true")
    assert decision_of(out).route_by is None


def test_an_end_in_the_warmup_asks_nothing(data, tmp_path):
    (ended,) = run_app(
        f"--out_dir={tmp_path}",
        *options(data),
        "--train.max_steps=14",
        "--train.stages=[{name: a, steps: 10, active_layers: 0}, "
        "{name: b, train_backbone: false, train_tables: false}]",
    )
    assert ended.code == 0, ended.shown
    assert decision_of(tmp_path, 14).brought is None
