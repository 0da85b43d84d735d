"""What a user gets for a mistake: exit code 2, one clear line, and nothing lost."""

import re
import shutil
import sys

import pytest

from tests.helpers.datasets import SCHEMA, toy_table, write_folder
from tests.helpers.processes import RankFailed, run_command
from tests.helpers.runs import run_app, SMALL, train
from torchrec_hilomoe.data.schema import SCHEMA_FILE
from torchrec_hilomoe.training import checkpoint

MISTAKES = {
    "unknown flag": (["--train.max_stepz=3"], "train.max_stepz.*Did you mean 'train.max_steps'"),
    "unknown recipe": (["--config=bst-synthetik"], "bst-synthetik.*Did you mean 'bst-synthetic'"),
    "wrong value": (["--train.batch_size=many"], "train.batch_size: Expected an integer.*many"),
    "batch of none": (["--train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
    "negative seed": (["--seed=-1"], "seed must not be negative, got -1"),
    "missing data": (["--data.path=nowhere"], "no data folder nowhere.*torchrec_hilomoe prepare"),
    "no checkpoint": (["--resume=nowhere/step_3"], "no checkpoint at nowhere/step_3"),
    "fused Adam on CPU": (
        ["--train.table_optimizer=adam", "--train.device=cpu"],
        "train.table_optimizer is 'adam'.*rowwise_adagrad",
    ),
    "uneven heads": (["--model.bst.num_heads=5"], "num_heads=5 and width=48"),
    "unknown backbone": (["--model.backbone=bts"], "'bts'.*Did you mean 'bst'"),
    "no such site": (["--model.hilomoe.sites=[nowhere]"], "'nowhere' matches none.*head.hidden.0"),
    "missing layer": (["--train.stages=[{name: a, active_layers: 9}]"], "'a'.*layer 9.*has 3"),
    "stages too long": (["--train.stages=[{name: a, steps: 99}]"], "cover 99 steps.*has 18"),
    "remote folder": (
        ["--out_dir=s3://team/run"],
        "local folder, got 's3://team/run'.*checkpoint.f",
    ),
    "folder in a file": (["--out_dir=README.md/run"], "out_dir README.md/run cannot be made"),
}


def told(shown: str) -> str:
    """The one line that starts with ``error:``."""
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
def test_the_command_ends_with_2_and_one_line(tmp_path):
    flags, message = MISTAKES["unknown flag"]
    out = f"--out_dir={tmp_path / 'out'}"
    result = run_command([sys.executable, "apps/train.py", *SMALL, out, *flags])
    assert result.returncode == 2
    assert re.search(message, told(result.stderr))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(name, marks=pytest.mark.slow if index % 2 else ())  # each a process of its own
        for index, name in enumerate(MISTAKES)
    ],
)
def test_every_mistake_is_named_with_its_remedy(mistake, tmp_path):
    flags, message = MISTAKES[mistake]
    (ended,) = run_app(f"--out_dir={tmp_path}", *flags)
    assert ended.code == 2
    assert re.search(message, told(ended.shown))
    assert not list(tmp_path.rglob("*.json*")), "something was written"


@pytest.mark.parametrize("mistake", ["unknown flag", "missing data"])
def test_several_ranks_tell_it_once(mistake, tmp_path):
    flags, message = MISTAKES[mistake]
    first, second = run_app(f"--out_dir={tmp_path}", *flags, ranks=2)
    assert (first.code, second.code) == (2, 2)
    assert re.search(message, told(first.shown))
    assert not re.search("(?m)^error: ", second.shown)


def test_ranks_that_a_batch_cannot_be_shared_by(tmp_path):
    first, _ = run_app(f"--out_dir={tmp_path}", "--train.batch_size=9", ranks=2)
    assert first.code == 2
    assert re.search("batch_size.*9.*2", told(first.shown))


def test_a_half_prepared_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    SCHEMA.save(str(data / SCHEMA_FILE))
    (ended,) = run_app(f"--out_dir={tmp_path / 'out'}", f"--data.path={data}")
    assert ended.code == 2
    assert re.search(r"data.*torchrec_hilomoe prepare", told(ended.shown))


def test_no_rows_to_test_by_are_told_before_training(tmp_path):
    splits = {"train": [toy_table(300)], "valid": [toy_table(64)], "test": [toy_table(0)]}
    data = write_folder(tmp_path / "data", splits)
    (ended,) = run_app(f"--out_dir={tmp_path / 'out'}", f"--data.path={data}")
    assert ended.code == 2
    assert re.search(r"/test has no rows.* a --test_percent above 0", told(ended.shown))
    assert not list(tmp_path.glob("out/*.json*"))


@pytest.mark.slow
def test_a_used_folder_is_not_written_over(tmp_path):
    out = tmp_path / "run"
    train(out)
    kept = {path: path.read_bytes() for path in out.glob("*.*") if path.is_file()}
    for flags, message in {
        "--resume=never": "already holds a run and resume is 'never'. Give another --out_dir",
        "--dry_run": "already holds a run and dry_run is true",
        "--model.embedding_dim=8": "does not fit this model: .* differences.",
    }.items():
        (ended,) = run_app(f"--out_dir={out}", flags)
        assert ended.code == 2
        assert re.search(message, told(ended.shown))
    assert {path: path.read_bytes() for path in kept} == kept
    assert (out / "checkpoints" / "step_18" / "progress.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "progress.json",
        *(pytest.param(it, marks=pytest.mark.slow) for it in (".metadata", "__0_0.distcp")),
    ],
)
def test_a_damaged_checkpoint_is_told(damage, finished, tmp_path):
    path = shutil.copytree(finished / "checkpoints" / "step_18", tmp_path / "step_18")
    (path / damage).write_bytes((path / damage).read_bytes()[:-40])
    (ended,) = run_app(f"--out_dir={tmp_path / 'out'}", f"--resume={path}")
    assert ended.code == 2
    assert "damaged" in ended.shown
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is complete."""
    out = tmp_path_factory.mktemp("finished")
    train(out)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(ranks, tmp_path):
    flags = ["--train.learning_rate=1e30", "--train.warmup_steps=0", "--checkpoint.every_steps=4"]
    told = r"the loss is (nan|inf) at step \d+ on rank \d, in the batch that ends at .*lane_rows"
    with pytest.raises(RankFailed, match=told):
        train(tmp_path, *flags, ranks=ranks)
    assert checkpoint.latest(tmp_path / "checkpoints") is None
