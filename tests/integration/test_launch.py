"""The commands of the README's first lines, through TorchX, with two real processes."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run_command

# TorchX starts the `torchrun` that it finds on the PATH, as in an activated environment.
ACTIVATED = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
TORCHX_RUN = ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", "1x2"]
SMALL = ["--train.max_steps", "6", "--train.batch_size", "64", "--data.eval_rows", "512"]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(["apps/train.py"], id="path"),
        pytest.param(["--script", "apps/train.py"], marks=pytest.mark.slow, id="script"),
    ],
)
@pytest.mark.slow
def test_two_ranks_train_to_the_end(form, tmp_path):
    out = tmp_path / "out"
    result = run_command([*TORCHX_RUN, *form, "--", *SMALL, "--out_dir", out], env=ACTIVATED)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["steps"] == 6
    assert summary["route_by"]["verdict"].startswith("cannot judge")  # too short to
    assert 0.0 < summary["test"]["auc"] < 1.0
    assert (out / "checkpoints" / "step_6").is_dir()
