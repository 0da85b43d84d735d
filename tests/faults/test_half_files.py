"""Files that a run writes and later trusts are whole or as they were, and strict JSON."""

import json
import os
import shutil

import pyarrow as pa
import pytest

from tests.helpers.datasets import replace_column, toy_table, write_folder
from tests.helpers.faults import run_with
from torchrec_hilomoe.runtime import paths
from torchrec_hilomoe.runtime.paths import write_text


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_torn_summary_is_noticed_and_made_again(finished, tmp_path, share):
    """What a version that wrote in place left when it was killed, or its disk was full."""
    out = shutil.copytree(finished, tmp_path / "run")
    summary = out / "summary.json"
    whole = summary.read_bytes()
    summary.write_bytes(whole[: int(len(whole) * share)])
    (ended,) = run_with(None, [f"--out_dir={out}"], ranks=1)
    assert ended.code == 0, ended.shown
    want, got = json.loads(whole), strict(summary.read_text())
    speeds = [it.pop("samples_per_second") for it in (got, want)]
    assert got == want
    assert speeds[0] >= 0


def test_a_whole_summary_is_left_alone(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    before = (out / "summary.json").read_bytes()
    (ended,) = run_with(None, [f"--out_dir={out}"], ranks=1)
    assert "is complete" in ended.shown
    assert (out / "summary.json").read_bytes() == before


def test_what_is_undefined_is_null(tmp_path):
    """A split without a click has no AUC."""
    none = replace_column(toy_table(64), "label", pa.array([0] * 64, pa.int8()))
    splits = {"train": [toy_table(256)], "valid": [none], "test": [none]}
    data = write_folder(tmp_path / "data", splits)
    flags = ["--model.embedding_dim=4", "--train.stages=null", "--train.max_steps=4"]
    argv = [f"--data.path={data}", f"--out_dir={tmp_path / 'run'}", *flags]
    (ended,) = run_with(None, argv, ranks=1)
    assert ended.code == 0, ended.shown
    assert strict((tmp_path / "run" / "summary.json").read_text())["test"]["auc"] is None
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        strict(line)


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, at):
    file = tmp_path / "file.json"
    write_text(str(file), '{"a": 1}')

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.os, at, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(str(file), '{"a": 2}')
    monkeypatch.undo()
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]
