"""``apps/plan.py``: what it prints and writes, and how it ends."""

import json
import sys

import pytest

from tests.helpers.processes import run_command
from torchrec_hilomoe.apps import plan as app

ARGUMENTS = ["--world_size", "16", "--hosts", "2", "--train.batch_size", "16384"]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Call the app in this process, its console as it is."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(app, "set_up_console", lambda rank: None)
        code = app.main(arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.mark.slow
def test_the_command_prints_draws_and_writes(tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = [sys.executable, "apps/plan.py", "--config", "bst-synthetic", *ARGUMENTS]
    command += ["--hbm", "80GB", "--inter_bandwidth", "25", "--rows", "item=1e8"]
    done = run_command([*command, "--out", out, "--plot", picture], timeout=120)
    assert done.returncode == 0, done.stderr
    assert "16 ranks on 2 hosts, cuda, 80.0 GB a device" in done.stdout
    assert "bandwidth between hosts: 25.0 GB/s (given)" in done.stdout
    assert "model.sparse.unpooled.item      100,000,000" in done.stdout
    assert json.loads(out.read_text())["fits"] is True
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_overrides_are_those_of_training(plan):
    code, text, _ = plan(*ARGUMENTS, "--hbm", "80GB", "--model.embedding_dim", "32")
    assert code == 0
    assert "1,024 on each rank" in text
    assert {line.split()[2] for line in text.splitlines() if " fused " in line} == {"32"}


def test_what_does_not_fit_ends_with_1(plan):
    code, text, error = plan(*ARGUMENTS, "--hbm", "1GB", "--rows", "item=1e10")
    assert (code, text) == (1, "")
    assert "It does NOT fit: table 'item' (10,000,000,000 rows of 16)" in error
    code, text, _ = plan("--hbm", "500MB", "--train.batch_size", "65536")
    assert code == 1
    assert "It does NOT fit: rank 0 needs" in text


def test_the_ending_says_the_format_and_there_may_be_none(plan, tmp_path):
    for name, start in (("plan", b"\x89PNG"), ("plan.svg", b"<?xml")):
        code, _, _ = plan("--hbm", "80GB", "--plot", str(tmp_path / name))
        assert code == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    code, _, error = plan("--hbm", "80GB", "--plot", str(tmp_path / "plan.doc"))
    assert code == 2
    assert "plan.doc ends with .doc" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: sharding.hbm is null, and the GPUs are not here to be asked"),
        (["--hbm", "much"], "sharding.hbm is 'much', which is no amount of memory"),
        (["--wrold_size", "8"], "no option --wrold_size. Did you mean 'world_size'?"),
        (["--hbm", "80GB", "--out", "apps"], "error: --out apps is a folder. Name a file"),
        (["--hbm", "80GB", "--plot", "README.md/p.png"], "--plot README.md/p.png: its folder"),
        (["--hbm", "80GB", "--rows", "item=0"], "--rows item=0: a table has at least one row"),
        (["--modle.backbone", "din"], "error: there is no option --modle.backbone. Did you mean"),
        (["--hbm", "80GB", "--world_size", "3", "--hosts", "2"], "cannot be shared by --hosts 2"),
    ],
)
def test_what_the_user_must_mend_ends_with_2(plan, arguments, message):
    code, _, error = plan(*arguments)
    assert code == 2
    assert message in error
