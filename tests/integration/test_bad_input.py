"""What a user gets for a mistake: exit code 2, one clear line, and nothing lost."""

import re
import sys

import pytest

from tests.helpers.processes import RankFailed, run_command
from tests.helpers.runs import SMALL, train
from torchrec_hilomoe.training import checkpoint

MISTAKES = {
    "unknown flag": (["--train.max_stepz=3"], "train.max_stepz.*Did you mean .*train.max_steps"),
    "unknown recipe": (["--config=bst-synthetik"], "bst-synthetik.*Did you mean 'bst-synthetic'"),
    "wrong value": (["--train.batch_size=many"], "train.batch_size.*many"),
    "missing data": (["--data.path=nowhere"], "no data folder nowhere.*apps/prepare.py"),
    "no checkpoint": (["--resume=nowhere/step_3"], "no checkpoint at nowhere/step_3"),
    "fused Adam on CPU": (
        ["--train.table_optimizer=adam", "--train.device=cpu"],
        "train.table_optimizer is 'adam'.*rowwise_adagrad",
    ),
    "uneven heads": (["--model.bst.num_heads=5"], "num_heads=5 and width=48"),
    "batch for no rank": (["--train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("mistake", ["unknown flag", "missing data"])
def test_the_app_says_it_in_one_line(mistake, tmp_path):
    flags, message = MISTAKES[mistake]
    out = f"--out_dir={tmp_path / 'out'}"
    result = run_command([sys.executable, "apps/train.py", *SMALL, out, *flags])
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_named_with_its_remedy(mistake, tmp_path):
    flags, message = MISTAKES[mistake]
    with pytest.raises(RankFailed, match=rf"(?s)(UsageError|ValueError|Error): .*{message}"):
        train(tmp_path, *flags)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_used_folder_is_not_written_over(tmp_path):
    train(tmp_path)
    files = [tmp_path / "config.yaml", tmp_path / "summary.json"]
    kept = [file.read_bytes() for file in files]
    for flags in (["--resume=never"], ["--dry_run"], ["--model.embedding_dim=8"]):
        with pytest.raises(RankFailed, match="already holds a run|does not fit this model"):
            train(tmp_path, *flags)
    assert [file.read_bytes() for file in files] == kept


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    flags = ["--train.learning_rate=1e30", "--train.warmup_steps=0", "--checkpoint.every_steps=4"]
    with pytest.raises(RankFailed, match=r"the loss is nan at step \d+ on rank 0.*lane_rows"):
        train(tmp_path, *flags)
    assert checkpoint.latest(tmp_path / "checkpoints") is None
