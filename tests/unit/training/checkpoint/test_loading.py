"""Loading: exactly what was saved, or one error that names what is damaged or does not fit."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import save, state
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("alone")


def test_no_checkpoint_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent \(progress.json is miss"):
        checkpoint.read_progress(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint at .*file"):
        checkpoint.read_progress(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 2}', '{"format": 2, "cr'])
def test_a_damaged_marker_is_told(tmp_path, text):
    marker = Path(save(tmp_path)) / "progress.json"
    marker.write_text(text)
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged"):
        checkpoint.read_progress(marker.parent)


def test_every_flipped_bit_of_the_marker_is_told(tmp_path):
    marker = Path(save(tmp_path)) / "progress.json"
    whole = marker.read_bytes()
    progress = checkpoint.read_progress(marker.parent)
    for at in range(len(whole)):
        marker.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = checkpoint.read_progress(marker.parent)
        except CheckpointError:
            continue
        assert found == progress  # a space became another kind of space


def test_another_format_is_refused(tmp_path):
    path = Path(save(tmp_path))
    described = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this package reads 2"):
        checkpoint.read_progress(path)


def test_the_marker_says_what_it_was_saved_with(tmp_path):
    described = json.loads((Path(save(tmp_path)) / "progress.json").read_text())
    assert described["world_size"] == 1
    names = ("torch", "torchrec", "torchrec-hilomoe")
    assert {name: version(name) for name in names}.items() <= described["versions"].items()


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
        checkpoint.load(path, wanted)


def test_what_may_differ_keeps_its_value_and_the_rest_is_loaded(tmp_path, caplog):
    path = save(tmp_path, tensors=state(4.0))
    wanted = state(0.0)
    wanted["model"].update(weight=torch.ones(4, 5), more=torch.full((2,), 3.0))
    wanted["optimizer"].pop("state")
    with pytest.raises(CheckpointError, match="2 differences"):
        checkpoint.load(path, wanted, allow_missing=["optimizer.*"])
    with caplog.at_level("INFO", logger="torchrec_hilomoe"):
        checkpoint.load(path, wanted, allow_missing=["optimizer.*", "model.weight", "*.more"])
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
            checkpoint.load(path, state())


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_lost_file_is_told(tmp_path, name):
    path = Path(save(tmp_path, documents={"plan.txt": "a plan"}))
    size = (path / name).stat().st_size
    (path / name).write_bytes((path / name).read_bytes()[:-2])
    cut = rf"{re.escape(name)} has {size - 2} bytes, {size} were written\. Give an older one"
    with pytest.raises(CheckpointError, match=cut):
        checkpoint.load(path, state())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"damaged: .*{re.escape(name)} cannot be read"):
        checkpoint.load(path, state())
