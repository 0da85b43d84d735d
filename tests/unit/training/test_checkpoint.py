"""Checkpoints: whole or absent, exactly what was saved, and nothing in them is executed."""

import contextlib
import io
import json
import pickle
import re
import resource
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from torchrec_hilomoe.data.batch import Position
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError, Progress

pytestmark = pytest.mark.usefixtures("alone")

INDEX = ".metadata"


def state(fill: float = 1.0) -> dict[str, Any]:
    """Nested tensors of several types and shapes."""
    return {
        "model": {
            "weight": torch.full((3, 5), fill),
            "half": torch.full((2,), fill, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
        },
        "optimizer": {"state": {"weight.step": torch.tensor(fill)}},
    }


def progress(step: int = 1) -> Progress:
    position = Position(epoch=2, lane_rows=30, lanes=8)
    return Progress(step=step, stage="expert_warmup[2]", position=position, total_steps=20)


def save(folder: Path, step: int = 1, keep: int = 3) -> Path:
    return checkpoint.save(folder, state(float(step)), progress(step), keep)


def tensors(nested: dict[str, Any]) -> list[torch.Tensor]:
    return [
        tensor
        for value in nested.values()
        for tensor in (tensors(value) if isinstance(value, dict) else [value])
    ]


class TouchesAFile:
    """Its pickle runs code of the attacker's choice when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def dotted(path: Path) -> bytes:
    """A pickle that reaches ``os.mkdir`` as an attribute of a module that the index may name."""
    module, name = b"torch.distributed.checkpoint.filesystem", b"os.mkdir"
    target = str(path).encode()
    return b"\x80\x04" + b"".join(
        [
            b"\x8c" + bytes([len(module)]) + module,
            b"\x8c" + bytes([len(name)]) + name + b"\x93",
            b"X" + len(target).to_bytes(4, "little") + target + b"\x85R.",
        ]
    )


def test_tensors_and_progress_come_back(tmp_path):
    path = save(tmp_path, step=7)
    assert path == tmp_path / "step_7"
    assert checkpoint.read_progress(path) == progress(7)
    loaded = state(0.0)
    checkpoint.load(path, loaded)
    for got, want in zip(tensors(loaded), tensors(state(7.0)), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.rand(5)
    path = save(tmp_path)
    want = torch.rand(9)
    torch.manual_seed(1)
    checkpoint.load(path, state())
    assert torch.equal(torch.rand(9), want)


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11", "step_9"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_11"
    save(tmp_path, 100, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_100"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.save(tmp_path, state(5.0), progress(1), keep=3)
    loaded = state(0.0)
    checkpoint.load(path, loaded)
    assert torch.equal(loaded["model"]["weight"], torch.full((3, 5), 5.0))
    assert [found.name for found in tmp_path.iterdir()] == ["step_1"]


def test_an_unfinished_folder_is_no_checkpoint_and_is_cleared_away(tmp_path):
    """What a process leaves that was killed while it saved."""
    assert checkpoint.latest(tmp_path / "absent") is None
    save(tmp_path, 4).rename(tmp_path / ".step_4.partial")
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_2"
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path):
    save(tmp_path, 1)
    large = {"model": {"weight": torch.ones(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files cannot be written
    try:
        with pytest.raises(CheckpointError, match="step_2 could not be written: .*disk full"):
            checkpoint.save(tmp_path, large, progress(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_1"
    checkpoint.load(tmp_path / "step_1", state())


def test_no_checkpoint_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent \(progress.json is miss"):
        checkpoint.read_progress(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint at .*file"):
        checkpoint.read_progress(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": 1}', '{"format": 1, "step": 2, "stage": "a", "position": 3}'],
)
def test_damaged_progress_is_told(tmp_path, text):
    path = save(tmp_path)
    (path / "progress.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged"):
        checkpoint.read_progress(path)


def test_progress_that_is_no_text_is_told(tmp_path):
    path = save(tmp_path)
    (path / "progress.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged"):
        checkpoint.read_progress(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    described = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this package reads 1"):
        checkpoint.read_progress(path)


def test_progress_says_what_it_was_saved_with(tmp_path):
    described = json.loads((save(tmp_path) / "progress.json").read_text())
    assert described["world_size"] == 1
    assert {name: version(name) for name in ("torch", "torchrec")}.items() <= (
        described["versions"].items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["model"].pop("half"),
            "1 differences.\n  model.half: in the checkpoint only",
        ),
        (
            lambda s: s["model"].update(more=torch.ones(1)),
            "1 differences.\n  model.more: missing from the checkpoint",
        ),
        (
            lambda s: s["optimizer"].pop("state"),
            "optimizer.state.weight.step: in the checkpoint only",
        ),
        (
            lambda s: s["model"].update(weight=torch.ones(5, 3)),
            "model.weight: (3, 5) in the checkpoint, (5, 3) in the model",
        ),
        (
            lambda s: s["model"].update(weight=torch.ones(4, 5), extra=torch.ones(2)),
            "2 differences.\n  model.extra: missing from the checkpoint\n"
            "  model.weight: (3, 5) in the checkpoint, (4, 5) in the model\n"
            "Use the configuration that it was saved with",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_tensors_are_named(
    tmp_path, change, message
):
    path = save(tmp_path)
    wanted = state()
    change(wanted)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(path, wanted)


@pytest.mark.parametrize("make", [lambda at: pickle.dumps(TouchesAFile(at)), dotted])
def test_code_in_the_index_is_refused_and_not_executed(tmp_path, make):
    path = save(tmp_path / "run")
    trace = tmp_path / "trace"
    attack = make(trace)
    pickle.loads(attack)
    assert trace.exists()  # so the attack works, on whoever falls for it
    trace.rmdir() if trace.is_dir() else trace.unlink()
    (path / INDEX).write_bytes(attack)
    with pytest.raises(CheckpointError, match="the index names .*, which is not allowed"):
        checkpoint.load(path, state())
    assert not trace.exists()


@pytest.mark.parametrize("key", ["model.weight", "rng.rank0"])
def test_an_object_in_place_of_a_tensor_is_refused_and_not_executed(tmp_path, key):
    """DCP would unpickle an entry that the index calls bytes."""
    trace = tmp_path / "trace"
    folder = tmp_path / "run"
    name, _, leaf = key.partition(".")
    poisoned = {"rng": {"rank0": torch.get_rng_state()}, **state()}
    poisoned[name][leaf] = TouchesAFile(trace)
    path = save(folder)
    (path / INDEX).unlink()
    dcp.save(poisoned, storage_writer=dcp.FileSystemWriter(path))
    with pytest.raises(CheckpointError, match=f"{re.escape(key)}: .*not a tensor"):
        checkpoint.load(path, state())
    assert not trace.exists()


def test_an_index_that_is_another_thing_is_refused(tmp_path):
    path = save(tmp_path)
    (path / INDEX).write_bytes(pickle.dumps(dcp.metadata.StorageMeta()))
    with pytest.raises(CheckpointError, match="damaged: the index is a StorageMeta"):
        checkpoint.load(path, state())


def test_a_cut_or_garbled_index_is_told(tmp_path):
    path = save(tmp_path)
    whole = (path / INDEX).read_bytes()
    for length in range(0, len(whole), 37):
        (path / INDEX).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="incomplete or damaged"):
            checkpoint.load(path, state())
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        checkpoint.load(path, state())


def test_a_flipped_bit_of_the_index_is_told_or_harmless(tmp_path):
    path = save(tmp_path)
    whole = (path / INDEX).read_bytes()
    for at in range(0, len(whole), 23):
        (path / INDEX).write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(CheckpointError):  # any other error is a failure
            checkpoint.load(path, state())


def test_a_lost_or_cut_shard_is_told(tmp_path):
    path = save(tmp_path)
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"step_1 is incomplete or damaged"):
        checkpoint.load(path, state())
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete or damaged: rank 0: .*__0_0\.distcp"):
        checkpoint.load(path, state())


def test_an_index_may_ask_for_enum_members_and_nothing_else():
    """Python before 3.11.4 pickles an enum's member as a call of getattr."""
    unpickler = checkpoint._IndexUnpickler(io.BytesIO())
    getattr_of_index = unpickler.find_class("builtins", "getattr")
    assert getattr_of_index(signal.Signals, "SIGTERM") is signal.SIGTERM
    for owner, name in ((signal.Signals, "mro"), (dict, "fromkeys")):
        with pytest.raises(pickle.UnpicklingError, match=name):
            getattr_of_index(owner, name)
