"""Loading: exactly what was saved, or one error that names what is damaged or does not fit."""

import json
import os
import re
import zlib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import progress, save, state
from tests.helpers.datasets import SCHEMA
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError
from torchrec_hilomoe.training.checkpoint.manifest import write_manifest

pytestmark = pytest.mark.usefixtures("alone")


def test_no_checkpoint_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent \(progress.json is miss"):
        checkpoint.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint at .*file"):
        checkpoint.open(tmp_path / "file")


ODD = ["", "{", "[]", "3", "{}", "null", '{"format": NaN}', '{"format": 2, "cr', "[" * 5000, "\xff"]


@pytest.fixture
def damaged(tmp_path):
    """A checkpoint without tensors, to be damaged."""
    write_manifest(str(tmp_path), progress(3), {})
    SCHEMA.save(f"{tmp_path}/schema.json")
    assert checkpoint.open(tmp_path).schema == SCHEMA
    return tmp_path


@pytest.mark.parametrize("text", ODD)
def test_a_damaged_marker_is_told(damaged, text):
    (damaged / "progress.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged: .*\. Give an older"):
        checkpoint.open(damaged)


@pytest.mark.parametrize("text", ODD)
def test_a_damaged_schema_is_told(damaged, text):
    (damaged / "schema.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"damaged: .*schema\.json.*\. Give an older") as told:
        _ = checkpoint.open(damaged).schema
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": "1"}, "step is '1', and must be a whole number"),
        ({"step": -1}, "step is -1, and counts something"),
        ({"stage": None}, "stage is null, and must be text"),
        ({"best": [1]}, "best is a list, and must be a mapping"),
        ({"best": {"metric": "auc", "value": None, "step": 1}}, "best.value is null, and must be"),
        ({"best": {"metric": "auc", "value": "high", "step": 1}}, "best.value is 'high', and mus"),
        ({"stopping": {"value": 0.5, "step": 1}}, "stopping.metric is missing"),
        ({"position": 5}, "position is 5, and must be a mapping"),
        ({"position": {"epoch": 0}}, "lane_rows is missing"),
        ({"position": {"epoch": 0, "lane_rows": 0, "lanes": 0}}, "num_canonical_shards is 0"),
        ({"schedule": []}, "schedule is a list, and must be a mapping"),
        ({"files": {"a": {"bytes": 1}}}, "files.a.crc32 is missing"),
        ({"files": ["a"]}, "files is a list, and must be a mapping"),
    ],
)
def test_a_marker_of_wrong_types_is_told_though_its_sum_is_right(damaged, change, problem):
    file = damaged / "progress.json"
    described = {**json.loads(file.read_text()), **change}
    del described["crc32"]
    sealed = zlib.crc32(json.dumps(described, sort_keys=True).encode())
    file.write_text(json.dumps({**described, "crc32": sealed}))
    with pytest.raises(CheckpointError, match=f"progress.json is damaged: {re.escape(problem)}"):
        checkpoint.open(damaged)


def test_a_marker_or_a_file_that_is_a_fifo_is_told_at_once(tmp_path):
    path = Path(save(tmp_path))
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")
    with pytest.raises(CheckpointError, match=r"damaged: .*\.metadata is a FIFO"):
        checkpoint.open(path).verify()
    (path / "progress.json").unlink()
    os.mkfifo(path / "progress.json")
    with pytest.raises(CheckpointError, match=r"progress\.json is a FIFO"):
        checkpoint.open(path)


def test_every_flipped_bit_of_the_marker_is_told(tmp_path):
    manifest = Path(save(tmp_path)) / "progress.json"
    whole = manifest.read_bytes()
    progress = checkpoint.open(manifest.parent).progress
    for at in range(len(whole)):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = checkpoint.open(manifest.parent).progress
        except CheckpointError:
            continue
        assert found == progress  # a space became another kind of space


def test_another_format_is_refused(tmp_path):
    path = Path(save(tmp_path))
    described = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this package reads 2"):
        checkpoint.open(path)


def test_the_marker_says_what_it_was_saved_with(tmp_path):
    described = json.loads((Path(save(tmp_path)) / "progress.json").read_text())
    assert described["world_size"] == 1
    here = {"torch": torch.__version__} | {
        name: version(name) for name in ("torchrec", "torchrec-hilomoe")
    }
    assert here.items() <= described["versions"].items()


DIFFERENCES = {
    "extra": (lambda s: s["model"].pop("half"), "1 differences.\n  model.half: in the checkpoint"),
    "missing": (
        lambda s: s["model"].update(more=torch.ones(1)),
        "1 differences.\n  model.more: missing from the checkpoint",
    ),
    "optimizer": (
        lambda s: s["optimizer"].pop("state"),
        "optimizer.state.weight.step: in the checkpoint only",
    ),
    "reshaped": (
        lambda s: s["model"].update(weight=torch.ones(5, 3)),
        "model.weight: (3, 5) in the checkpoint, (5, 3) in the model",
    ),
    "two": (
        lambda s: s["model"].update(weight=torch.ones(4, 5), extra=torch.ones(2)),
        "2 differences.\n  model.extra: missing from the checkpoint\n"
        "  model.weight: (3, 5) in the checkpoint, (4, 5) in the model\n"
        "Use the configuration that it was saved with",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_what_does_not_fit_is_refused_and_named(tmp_path, kind):
    change, message = DIFFERENCES[kind]
    path = save(tmp_path)
    wanted = state()
    change(wanted)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.open(path).load(wanted)


def test_what_may_differ_keeps_its_value_and_the_rest_is_loaded(tmp_path, caplog):
    path = save(tmp_path, tensors=state(4.0))
    wanted = state(0.0)
    wanted["model"].update(weight=torch.ones(4, 5), more=torch.full((2,), 3.0))
    wanted["optimizer"].pop("state")
    with pytest.raises(CheckpointError, match="2 differences"):
        checkpoint.open(path).load(wanted, allow_missing=["optimizer.*"])
    with caplog.at_level("INFO", logger="torchrec_hilomoe"):
        checkpoint.open(path).load(wanted, allow_missing=["optimizer.*", "model.weight", "*.more"])
    assert torch.equal(wanted["model"]["weight"], torch.ones(4, 5))
    assert torch.equal(wanted["model"]["more"], torch.full((2,), 3.0))
    assert torch.equal(wanted["model"]["half"], torch.full((2,), 4.0, dtype=torch.bfloat16))
    assert "model.more, model.weight, optimizer.state.weight.step" in caplog.text


FILES = ["__0_0.distcp", ".metadata", "plan.txt"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_any_file_is_told(tmp_path, name):
    path = Path(save(tmp_path, documents={"plan.txt": "a plan"}))
    whole = (path / name).read_bytes()
    for at in range(0, len(whole), 1 + len(whole) // 40):
        (path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(
            CheckpointError, match=rf"damaged: the bytes of .*{re.escape(name)} are"
        ):
            checkpoint.open(path).load(state())


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_lost_file_is_told(tmp_path, name):
    path = Path(save(tmp_path, documents={"plan.txt": "a plan"}))
    size = (path / name).stat().st_size
    (path / name).write_bytes((path / name).read_bytes()[:-2])
    cut = rf"{re.escape(name)} has {size - 2} bytes, {size} were written\. Give an older one"
    with pytest.raises(CheckpointError, match=cut):
        checkpoint.open(path).load(state())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"damaged: .*{re.escape(name)} cannot be read"):
        checkpoint.open(path).load(state())
