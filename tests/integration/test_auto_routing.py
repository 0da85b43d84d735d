"""``model.hilomoe.route_by: auto``: found while the plain model trains, however it runs."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.datasets import replace_column, toy_table, write_folder
from tests.helpers.processes import run_ranks
from tests.helpers.runs import (
    assert_same_metrics,
    read_lines,
    read_tensors,
    run_app,
    train,
    train_each,
)
from tests.integration.test_tools import evaluate, use
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint.loading import OF_A_RANK
from torchrec_hilomoe.training.log.reading import read_probe, read_summary
from torchrec_hilomoe.training.log.run_log import METRICS_FILE, ROUTING_FILE

# Experts begin after step 10 of 18. Of the steps before, 8 are heard: 4 fit, from step 2 on, and
# 4 judge, from step 6 on.
AUTO = (
    "--model.hilomoe.routing=sample",
    "--model.hilomoe.route_by=auto",
    "--model.hilomoe.num_experts=4",
    "--train.batch_size=256",
    "--model.hilomoe.probe_steps=8",
    "--model.backbone=din",
    "--model.head=[16,8]",
    "--model.embedding_dim=8",
    "--train.backbone_share=0.55",
    "--train.frozen_share=0.2",
    "--train.device=cpu",
)
BEGIN, STEPS = 10, 18
HISTORIES = ("clicks_item", "clicks_kind", "views_item")


def make_data(
    folder, *, decided: bool, train: int = 6144, valid: int = 2048, with_history: int | None = None
):
    """Clicks that go by price and age, with some kinds up, with others down; or by a coin.

    Only the first ``with_history`` rows of a split have a history; None: all may have one.
    """
    splits = {}
    for seed, (split, rows) in enumerate({"train": train, "valid": valid, "test": 512}.items()):
        table, rng = toy_table(rows, seed=seed), np.random.default_rng(seed + 10)
        price, age = rng.normal(size=(2, rows))
        sign = np.where(np.array(table["kind"].to_pylist()) % 2 == 0, 1.0, -1.0)
        slope = 4.0 * sign * (price + age) if decided else np.zeros(rows)
        clicks = rng.random(rows) < 1 / (1 + np.exp(-slope))
        users = np.arange(rows) % 40
        columns = {
            "user": users,
            "price": price,
            "age": age,
            "label": clicks.astype(int),
        }
        for name, values in columns.items():
            if name == "age":
                table = table.set_column(table.column_names.index(name), name, [values])
            else:
                table = replace_column(table, name, values.tolist())
        for name in HISTORIES if with_history is not None else ():
            kept = table[name].to_pylist()[:with_history]
            table = replace_column(table, name, kept + [[]] * (rows - len(kept)))
        splits[split] = [table]
    return write_folder(folder, splits)


@pytest.fixture(scope="module")
def deciding(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "deciding", decided=True)


@pytest.fixture(scope="module")
def coins(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "coins", decided=False)


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["one rank", "two ranks"],
)
def whole(request, deciding, tmp_path_factory):
    """An uninterrupted run with a checkpoint of every step, and its number of ranks."""
    out = tmp_path_factory.mktemp("whole")
    options = (f"--data.path={deciding}", "--checkpoint.every_steps=1")
    train(out, *AUTO, *options, ranks=request.param)
    return out, request.param


def decision_of(out, step: int = STEPS):
    return checkpoint.open(out / "checkpoints" / f"step_{step}").progress.decision


def test_the_feature_that_decides_is_found(whole):
    out, _ = whole
    found = decision_of(out)
    assert found is not None
    assert found.step == BEGIN
    assert found.route_by is not None
    assert found.route_by[0] == ("kind",)
    assert decision_of(out, BEGIN) is None  # it is made before the first step of experts
    assert decision_of(out, BEGIN + 1) == replace(
        found, brought=None, verdict=found.verdict.partition(" Experts brought")[0]
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["route_by"]["route_by"] == [list(layer) for layer in found.route_by]
    assert summary["route_by"]["verdict"] == found.verdict
    assert summary["parameters"]["experts"] > 0
    report = json.loads((out / "probe.json").read_text(), parse_constant=pytest.fail)
    assert report["features"][0]["name"] == "kind"
    stages = {line["stage"] for line in read_lines(out / METRICS_FILE)}
    assert {"backbone_warmup", "expert_warmup[1]", "finetune"} <= stages


# Before the window, where rows fit, where they judge, at the boundary, and after it.
@pytest.mark.parametrize(
    "step",
    [8, BEGIN, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 5, 6, 11, 12))],
)
def test_resumed_equals_uninterrupted(whole, deciding, step, tmp_path):
    out, ranks = whole
    kept = tmp_path / "checkpoints" / f"step_{step}"
    shutil.copytree(out / "checkpoints" / f"step_{step}", kept)
    train(tmp_path, *AUTO, f"--data.path={deciding}", ranks=ranks)
    ours, theirs = (read_tensors(run / "checkpoints" / "step_18") for run in (out, tmp_path))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert decision_of(tmp_path) == decision_of(out)
    for name in (METRICS_FILE, ROUTING_FILE):
        lines, again = (read_lines(run / name) for run in (out, tmp_path))
        assert again == [line for line in lines if line["step"] > step]


def test_what_was_heard_is_kept_only_while_it_is_needed(whole):
    out, _ = whole
    for step, heard in ((1, False), (5, True), (9, True), (11, False)):
        names = read_tensors(out / "checkpoints" / f"step_{step}")
        assert any(name.startswith("probe.") for name in names) == heard, step


@pytest.mark.slow
def test_another_number_of_ranks_may_go_on_in_the_window(whole, deciding, tmp_path):
    out, ranks = whole
    shutil.copytree(out / "checkpoints" / "step_8", tmp_path / "checkpoints" / "step_8")
    train(tmp_path, *AUTO, f"--data.path={deciding}", ranks=3 - ranks)
    found = decision_of(tmp_path)
    assert found is not None
    assert found.route_by is not None
    assert found.route_by[0] == ("kind",)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (
            12,
            ["--model.hilomoe.num_layers=2"],
            "model.hilomoe.num_layers is 2, but the run has chosen the views of 3 expert layers at "
            "step 10, by route_by auto. Set it back to 3, or give another --out_dir.",
        ),
        (
            12,
            [
                "--model.hilomoe.route_by=[[place],[item],[place]]",
                "--model.hilomoe.probe_steps=null",
            ],
            "model.hilomoe.route_by is [[place], [item], [place]], but the experts of the "
            "checkpoint of step 12 have learned to be routed by [[kind], ",
        ),
        (
            8,
            ["--seed=5", "--model.hilomoe.num_experts=2", "--model.hilomoe.sites=[all]"],
            "seed is 5 (was 0), model.hilomoe.num_experts is 2 (was 4), model.hilomoe.sites is "
            "[all] (was [head]), but what route_by auto has heard by step 8 is for what was, and "
            "it has not decided yet. Set it back, or give another --out_dir.",
        ),
        pytest.param(
            8,
            ["--model.hilomoe.rank=2"],
            "model.hilomoe.rank is 2 (was 4), but what route_by auto has heard",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["layers", "views", "heard for others", "rank"],
)
def test_other_experts_are_refused_by_the_options_that_changed(
    whole, deciding, step, options, message, tmp_path
):
    out, ranks = whole
    name = f"checkpoints/step_{step}"
    shutil.copytree(out / name, tmp_path / name)
    ended = run_app(
        f"--out_dir={tmp_path}", *AUTO, f"--data.path={deciding}", *options, ranks=ranks
    )
    assert [rank.code for rank in ended] == [2] * ranks
    for rank in ended:
        assert f"error: {message}" in " ".join(rank.shown.split()), rank.shown


def test_a_checkpoint_is_evaluated_with_what_was_chosen(whole, tmp_path):
    out, _ = whole
    file = tmp_path / "result.json"
    argv = [out / "checkpoints" / "step_18", "--out", file, "--device", "cpu"]
    ((code, shown),) = run_ranks(evaluate, 1, argv, joined=False)
    assert code == 0, shown
    result = json.loads(file.read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert_same_metrics(result["metrics"], summary["test"], out / "checkpoints" / "step_18")
    assert result["routing"] is not None


def test_the_page_says_what_was_found(whole):
    pytest.importorskip("matplotlib")
    out, _ = whole
    code, shown = use("report", out)
    assert code == 0, shown
    page = (out / "report.html").read_text()
    assert "What routes the experts" in page
    assert "route by kind" in page


@pytest.fixture(scope="module")
def undecided(coins, tmp_path_factory):
    out = tmp_path_factory.mktemp("undecided")
    train(out, *AUTO, f"--data.path={coins}", "--checkpoint.every_steps=9")
    return out


def assert_same_tensors(ours, theirs):
    one, other = (read_tensors(it / "checkpoints" / f"step_{STEPS}") for it in (ours, theirs))
    names = [name for name in other if not name.startswith(OF_A_RANK)]
    assert set(names) == {name for name in one if not name.startswith(OF_A_RANK)}
    assert not [name for name in names if not torch.equal(one[name], other[name])]


@pytest.mark.slow
def test_where_nothing_decides_the_run_is_that_of_the_plain_model(undecided, coins, tmp_path):
    found = decision_of(undecided)
    assert found is not None
    assert found.route_by is None
    assert found.verdict.startswith(("nothing decides", "cannot tell yet"))
    model = [option for option in AUTO if "hilomoe" not in option]
    train(tmp_path, *model, "--model.hilomoe=null", f"--data.path={coins}")
    assert_same_tensors(undecided, tmp_path)
    stages = {line["stage"] for line in read_lines(undecided / METRICS_FILE)}
    assert stages == {"backbone_warmup", "finetune"}
    summaries = [json.loads((it / "summary.json").read_text()) for it in (undecided, tmp_path)]
    assert summaries[0]["flops"] == summaries[1]["flops"]


def test_rates_that_still_rise_at_the_boundary_rise_as_in_the_plain_model(coins, tmp_path):
    data, plain = f"--data.path={coins}", [option for option in AUTO if "hilomoe" not in option]
    longer = (data, "--train.warmup_steps=100")
    train_each(
        {
            tmp_path / "auto": [*AUTO, *longer],
            tmp_path / "plain": [*plain, *longer, "--model.hilomoe=null"],
        }
    )
    found = decision_of(tmp_path / "auto")
    assert found is not None
    assert (found.step, found.route_by) == (BEGIN, None)
    assert_same_tensors(tmp_path / "auto", tmp_path / "plain")


def test_a_plain_end_is_gone_on_with(undecided, coins, tmp_path):
    shutil.copytree(undecided, tmp_path / "run")
    train(tmp_path / "run", *AUTO, f"--data.path={coins}", "--train.max_steps=20")
    assert decision_of(tmp_path / "run", 20) == decision_of(undecided)


@pytest.mark.slow
def test_a_run_from_a_plain_model_listens_first_and_ranks_agree(deciding, tmp_path):
    """Rows of the validation split judge: the plain model may have been trained on the others."""
    plain, data = tmp_path / "plain", f"--data.path={deciding}"
    model = [option for option in AUTO if "hilomoe" not in option]
    brief = ("--model.hilomoe=null", "--train.max_steps=4", "--model.dropout=0")
    train(plain, *model, *brief, data)
    options = (data, f"--init_from={plain}/checkpoints/step_4")
    found = []
    for ranks in (1, 2):  # of one plain model, without dropout: they can only differ by rounding
        out = tmp_path / str(ranks)
        ended = run_app(f"--out_dir={out}", *AUTO, *options, "--model.dropout=0", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended
        assert "stage probe: steps 1 to 8" in ended[0].shown
        found.append(decision_of(out))
        assert found[-1].step == 8
        assert found[-1].route_by is not None
    assert found[0].route_by == found[1].route_by
    # What experts then brought depends on how they were trained, to rounding.
    verdicts = [it.verdict.partition(" Experts brought")[0] for it in found]
    assert verdicts[0] == verdicts[1]


@pytest.mark.slow
def test_dry_run_counts_the_widest_views(deciding, tmp_path):
    counted = []
    for number, option in enumerate(("auto", "[[kind],[item],[place]]")):
        out = tmp_path / str(number)
        options = (f"--data.path={deciding}", f"--model.hilomoe.route_by={option}", "--dry_run")
        (ended,) = run_app(f"--out_dir={out}", *AUTO, *options)
        assert ended.code == 0, ended.shown
        counted.append(json.loads((out / "summary.json").read_text()))
    assert counted[0]["parameters"] == counted[1]["parameters"]
    assert counted[0]["flops"] == counted[1]["flops"]


def test_a_run_too_short_to_judge_says_so_and_is_plain(deciding, tmp_path):
    """No step is left without experts; nor, at first, one in which the backbone learns."""
    short = (
        *("--train.max_steps=3", "--train.backbone_share=0.1", "--train.frozen_share=0.9"),
        *("--model.hilomoe.probe_steps=null", "--checkpoint.every_steps=1"),
    )
    out, again, data = tmp_path / "out", tmp_path / "again", f"--data.path={deciding}"
    (ended,) = run_app(f"--out_dir={out}", *AUTO, *short, data)
    assert ended.code == 0, ended.shown
    assert ended.shown.count("\nroute_by auto: counted with the widest features") == 1
    assert "\nfound: cannot judge: 0 rows of the 128 that 4 experts need" in ended.shown
    assert "The model stays plain." in ended.shown
    found = decision_of(out, 3)
    assert found is not None
    assert (found.step, found.route_by) == (0, None)
    summary = read_summary(out)
    assert summary["route_by"]["verdict"] == read_probe(out)["verdict"] == found.verdict
    assert summary["parameters"]["experts"] == 0
    assert [stage["name"] for stage in summary["stages"]] == ["backbone_warmup"]
    shutil.copytree(out / "checkpoints" / "step_1", again / "checkpoints" / "step_1")
    train(again, *AUTO, *short, data)
    assert decision_of(again, 3) == found
    ours, theirs = (read_tensors(run / "checkpoints" / "step_3") for run in (out, again))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_a_validation_split_too_short_to_judge_leaves_the_model_plain(tmp_path):
    """It judges in a run of several epochs, whose rows were trained on."""
    data, out = make_data(tmp_path / "data", decided=True, train=1024, valid=100), tmp_path / "out"
    (ended,) = run_app(f"--out_dir={out}", *AUTO, f"--data.path={data}", "--train.epochs=5")
    assert ended.code == 0, ended.shown
    assert "found: cannot judge: the validation split has 100 rows" in ended.shown
    assert "4 experts need 128" in " ".join(ended.shown.split())
    found = decision_of(out)
    assert found is not None
    assert (found.step, found.route_by) == (BEGIN, None)


def test_a_site_that_sees_too_few_events_to_judge_leaves_the_model_plain(tmp_path):
    """What is known only at the boundary does not cost the run its steps before."""
    data = make_data(tmp_path / "data", decided=True, with_history=20)
    options = (f"--data.path={data}", "--model.hilomoe.sites=[all]")
    (ended,) = run_app(f"--out_dir={tmp_path / 'out'}", *AUTO, *options)
    assert ended.code == 0, ended.shown
    shown = " ".join(ended.shown.split())
    assert "found: cannot judge: site 'model.backbone." in shown
    found = decision_of(tmp_path / "out")
    assert found is not None
    assert (found.step, found.route_by) == (BEGIN, None)


MORE = [
    (["--model.hilomoe.probe_steps=11"], r"probe_steps is 11, but .* 10 steps\. Lower it"),
    (["--model.hilomoe.probe_steps=1"], r"probe_steps must be at least 2 or null, got 1"),
    (["--model.hilomoe.query_dim=3"], r"views need query_dim = None, got query_dim = 3"),
    (
        ["--train.stages=[{name: a, steps: 9, active_layers: 0}, {name: b, active_layers: 0}]"],
        r"route_by is auto, but experts compute in no stage\. Add one",
    ),
    (
        [
            "--train.stages=[{name: a, steps: 9, active_layers: 0, plateau: {metric: auc}}, "
            "{name: b}]",
            "--train.evaluate_every=3",
        ],
        r"stage 'a' ends with a plateau of auc.*Give that stage a length",
    ),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.backbone_share=0"], r"backbone_share is 0\.0 and init_from is None\. Raise"),
        (["--model.hilomoe.routing=row"], r"route_by is auto.*routing is row\. Set routing"),
        *(pytest.param(*it, marks=pytest.mark.slow) for it in MORE),
    ],
    ids=lambda value: value[0][:32] if isinstance(value, list) else "",
)
def test_what_cannot_be_found_is_refused_before_the_first_step(
    options, message, deciding, tmp_path
):
    (ended,) = run_app(f"--out_dir={tmp_path}", *AUTO, f"--data.path={deciding}", *options)
    assert ended.code == 2
    assert re.search(message, " ".join(ended.shown.split())), ended.shown


@pytest.mark.slow
def test_a_run_whose_experts_were_named_is_not_gone_on_with(deciding, tmp_path):
    named = [option for option in AUTO if "route_by" not in option and "probe" not in option]
    views = "--model.hilomoe.route_by=[[kind],[item],[place]]"
    train(tmp_path, *named, views, f"--data.path={deciding}", "--train.max_steps=16")
    (ended,) = run_app(f"--out_dir={tmp_path}", *AUTO, f"--data.path={deciding}")
    assert ended.code == 2
    assert "says of no features that were found. Give the route_by" in ended.shown


@pytest.mark.slow
def test_the_best_step_may_be_one_before_experts_began(deciding, tmp_path):
    stages = "[{name: a, steps: 10, active_layers: 0}, {name: b, lr_scale: 100}]"
    options = ("--checkpoint.best=logloss", "--train.evaluate_every=5", f"--train.stages={stages}")
    train(tmp_path, *AUTO, *options, f"--data.path={deciding}")
    found = decision_of(tmp_path)
    assert found is not None
    assert found.route_by is not None
    assert json.loads((tmp_path / "summary.json").read_text())["tested_step"] <= BEGIN


@pytest.mark.slow
def test_in_the_composed_world_what_decides_is_found(tmp_path):
    """Two of the three at least, and first; a number whose effect is curved may come after them."""
    stages = "[{name: a, steps: 450, active_layers: 0, warmup_steps: 100}, {name: b}]"
    options = (
        *("--model.backbone=din", "--model.head=[64,32]", "--train.learning_rate=0.008"),
        *("--model.hilomoe.rank=4", "--train.table_learning_rate=0.2", "--train.warmup_steps=100"),
        *("--model.hilomoe.routing=sample", "--model.hilomoe.route_by=auto"),
        *("--data.train_rows=768000", "--train.batch_size=1024", "--train.max_steps=454"),
        f"--train.stages={stages}",
        *("--model.dropout=0", "--model.batch_norm=false", "--train.log_every=450"),
    )
    train(tmp_path, *options)
    found = decision_of(tmp_path, 454)
    assert found is not None
    assert found.route_by is not None
    first, second, _ = found.route_by
    assert {*first, *second} <= {"category", "category_history", "hour"}
