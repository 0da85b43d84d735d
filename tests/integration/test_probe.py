"""``apps/probe.py``: from a recipe or a checkpoint to a report, on any number of ranks."""

import json
import re

import pytest
import torch

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.runs import train
from tests.integration.test_tools import use

FLOAT = torch.float32
ROWS = 512  # that judge
SMALL = (
    "--train.batch_size=64",
    "--data.train_rows=4096",
    f"--data.eval_rows={ROWS}",
    "--model.backbone=din",
    "--model.head=[16,8]",
    "--train.device=cpu",
)
BRIEF = ("--steps=12", "--fit_batches=10", "--draws=2")


def probe(argv):
    return use("probe", *argv)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of a run without experts."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder, "--model.hilomoe=null", "--model.dropout=0.0", "--train.max_steps=6", *SMALL[3:])
    return folder / "checkpoints" / "step_6"


def test_a_recipe_is_trained_briefly_and_probed(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "probe.json", tmp_path / "probe.png"
    argv = [*SMALL, *BRIEF, "--json", file, "--plot", picture]
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 0, shown
    report = json.loads(file.read_text(), parse_constant=pytest.fail)
    names = {feature["name"] for feature in report["features"]}
    assert {"user", "item", "category", "hour", "category_history", "dense_00"} <= names
    gains = [feature["gain"] for feature in report["features"]]
    assert gains == sorted(gains, reverse=True)
    for feature in report["features"]:
        assert feature["low"] <= feature["high"], feature
    assert {feature["site"] for feature in report["features"]} == {
        f"model.backbone.head.hidden.{layer}" for layer in (0, 2)
    }
    assert set(report["controls"]) == {"random", "all", "wider"}
    assert report["pays"] in (True, False)
    assert report["verdict"] in shown
    assert "cannot tell yet" in shown or "trained for 12 steps only" in shown
    assert report["held_out_rows"] == ROWS
    assert report["fit_rows"] == 640
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_named_with_its_option(plain):
    pytest.importorskip("matplotlib")
    argv = ["--checkpoint", plain, *BRIEF[1:], "--plot", "/dev/full"]
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 2
    assert "error: --plot /dev/full cannot be written: No space left on device." in shown


@pytest.mark.slow
def test_a_checkpoint_gives_the_same_report_on_any_number_of_ranks(plain, tmp_path):
    reports = []
    for ranks in (1, 2, 4):
        file = tmp_path / f"{ranks}.json"
        argv = ["--checkpoint", plain, "--fit_batches=10", "--draws=2", "--json", file]
        found = run_ranks(probe, ranks, argv, joined=False)
        assert [code for code, _ in found] == [0] * ranks, found
        reports.append(json.loads(file.read_text()))
    one = reports[0]
    for other in reports[1:]:
        assert other["fit_rows"] == one["fit_rows"]
        assert other["held_out_rows"] == one["held_out_rows"] == ROWS
        gains, want = (
            {(f["name"], f["site"]): f["gain"] for f in r["features"]} for r in (other, one)
        )
        most = max(map(abs, want.values()))
        # float32 sums over rows; small gains are differences of products as large as the largest
        for key, gain in want.items():
            assert gains[key] - gain + most == rounded(most, terms=640, dtype=FLOAT), key
        assert other["route_by"] == one["route_by"]
        assert other["verdict"] == one["verdict"]


@pytest.mark.slow
def test_a_checkpoint_of_a_warm_up_is_as_good_as_a_plain_one_and_others_are_refused(tmp_path):
    train(
        tmp_path,
        "--model.dropout=0.0",
        "--checkpoint.every_steps=5",
        "--checkpoint.keep=9",
        "--model.hilomoe.routing=sample",
        "--model.hilomoe.route_by=[[category],[hour],[item]]",
        *SMALL[3:],
    )
    argv = ["--checkpoint", tmp_path / "checkpoints" / "step_5", *BRIEF[1:]]
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 0, shown
    argv[1] = tmp_path / "checkpoints" / "step_18"
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 2
    assert "step_18 is of stage 'finetune', in which experts compute" in shown
    assert "Give a checkpoint of a plain run" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], r"probe: --steps must be at least 1, got 0. Leave it out for 300."),
        (["--json", f"{__file__}/probe.json"], r"--json .*test_probe.py/probe.json"),
        pytest.param(["--stepz", "3"], r"there is no option --stepz", marks=pytest.mark.slow),
        (["--checkpoint", "{plain}", "--config", "din-movielens"], r"Drop one of them"),
        pytest.param(["--checkpoint", "nowhere"], r"nowhere", marks=pytest.mark.slow),
        (
            [*SMALL, *BRIEF, "--data.eval_rows=64"],
            r"probe: 64 rows of the validation split judge.*need 256",
        ),
        (
            [*SMALL, *BRIEF, "--data.eval_rows=64", "--steps=300000", "--train.max_steps=300000"],
            r"64 rows of the validation split judge.*data.eval_rows",
        ),
        (
            [*SMALL, *BRIEF, "--fit_batches=1"],
            r"64 training rows fit, but 8 experts need 256: 32 each.*--fit_batches",
        ),
        ([*SMALL, *BRIEF, "--model.hilomoe.num_experts=1"], r"num_experts is 1.*to 2 or more"),
        (
            [*SMALL, *BRIEF, "--init_from", "{plain}"],
            r"init_from is .*step_6, but .* Give --checkpoint .*step_6, or --init_from null",
        ),
        (["--checkpoint", "{plain}", "--init_from", "other"], r"init_from is other, but"),
        (
            [*SMALL, *BRIEF, "--resume", "{plain}"],
            r"resume is .*, but .*nothing.*--checkpoint PATH",
        ),
        ([*SMALL, *BRIEF, "--out_dir", "kept"], r"out_dir is kept, but .*--json FILE, --plot FILE"),
        ([*SMALL, *BRIEF, "--dry_run"], r"dry_run is true, but .* Leave --dry_run out"),
        (
            [*SMALL, *BRIEF, "--train.teacher=teachers/one"],
            r"train.teacher is teachers/one, but .*clicks alone\. Give --train.teacher null",
        ),
        (
            ["--json", "{plain}/a.png", "--plot", "{plain}/../step_6/a.png"],
            r"--json .*step_6/a.png and --plot .*step_6/a.png are one file.* Give two",
        ),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message(plain, argv, message):
    given = [part.format(plain=plain) for part in argv]
    ((code, shown),) = run_ranks(probe, 1, given, joined=False)
    assert code == 2
    assert re.search(message, shown), shown


@pytest.mark.slow
def test_steps_before_init_from_count_too(plain, tmp_path):
    """They do when that run is gone on with, and when another one begins with it."""
    began, given = plain, (*SMALL[3:], "--model.hilomoe=null", "--model.dropout=0.0")
    for steps, age in ((2, 8), (3, 11)):
        out = tmp_path / str(age)
        for longer in (1, steps):
            train(out, *given, f"--init_from={began}", f"--train.max_steps={longer}")
        began = out / "checkpoints" / f"step_{steps}"
        argv = ["--checkpoint", began, *BRIEF[1:]]
        ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
        assert code == 0, shown
        assert f"loaded {began}, a model of {age} steps" in shown


def test_what_may_differ_from_the_checkpoint_is_named_as_it_says(plain):
    argv = ["--checkpoint", plain, *BRIEF[1:], "--model.head=[16,4]"]
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 2
    assert "or name what may differ with --allow_missing" in shown
    argv += ["--allow_missing", "[model.*head*]"]
    ((code, shown),) = run_ranks(probe, 1, argv, joined=False)
    assert code == 0, shown


def test_help_begins_with_an_example():
    ((code, shown),) = run_ranks(probe, 1, ["--help"], joined=False)
    assert code == 0
    assert shown.startswith("Examples:\n    python -m torchrec_hilomoe probe --config")
