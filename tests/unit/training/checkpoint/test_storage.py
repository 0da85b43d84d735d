"""Loading someone's checkpoint executes nothing of it, however well it is made."""

import io
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from tests.helpers.checkpoints import progress, save, state
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError
from torchrec_hilomoe.training.checkpoint.manifest import FileChecksum, write_manifest
from torchrec_hilomoe.training.checkpoint.storage import IndexUnpickler, Store

pytestmark = pytest.mark.usefixtures("alone")

INDEX = ".metadata"


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


def vouch(path: Path) -> None:
    """Make the manifest fit the files again, as whoever forges a checkpoint would."""
    checksums: dict[str, FileChecksum] = {}
    for file in path.iterdir():
        store = Store()
        content = file.read_bytes()
        if file.name != "progress.json":
            with store.create_stream(file, "wb") as sink:
                sink.write(content)
            checksums |= store.checksums
    write_manifest(str(path), progress(), checksums)


@pytest.mark.parametrize("make", [lambda at: pickle.dumps(TouchesAFile(at)), dotted])
def test_code_in_the_index_is_refused_and_not_executed(tmp_path, make):
    path = Path(save(tmp_path / "run"))
    trace = tmp_path / "trace"
    attack = make(trace)
    pickle.loads(attack)
    assert trace.exists()  # so the attack works, on whoever falls for it
    trace.rmdir() if trace.is_dir() else trace.unlink()
    (path / INDEX).write_bytes(attack)
    vouch(path)
    with pytest.raises(CheckpointError, match="the index names .*, which is not allowed"):
        checkpoint.open(path).load(state())
    assert not trace.exists()


@pytest.mark.parametrize("key", ["model.weight", "rng.rank0"])
def test_an_object_in_place_of_a_tensor_is_refused_and_not_executed(tmp_path, key):
    """DCP would unpickle an entry that the index calls bytes; no pattern allows it."""
    trace = tmp_path / "trace"
    name, _, leaf = key.partition(".")
    poisoned = {"rng": {"rank0": torch.get_rng_state()}, **state()}
    poisoned[name][leaf] = TouchesAFile(trace)
    path = Path(save(tmp_path / "run"))
    (path / INDEX).unlink()
    dcp.save(poisoned, storage_writer=dcp.FileSystemWriter(path))
    vouch(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(key)}: .*not a tensor"):
        checkpoint.open(path).load(state(), allow_missing=["*"])
    assert not trace.exists()


def test_an_index_that_is_another_thing_is_refused(tmp_path):
    path = Path(save(tmp_path))
    (path / INDEX).write_bytes(pickle.dumps(dcp.metadata.StorageMeta()))
    vouch(path)
    with pytest.raises(CheckpointError, match="damaged: the index is a StorageMeta"):
        checkpoint.open(path).load(state())


def test_a_cut_index_that_is_vouched_for_is_told(tmp_path):
    path = Path(save(tmp_path))
    whole = (path / INDEX).read_bytes()
    for at in range(0, len(whole), 41):
        (path / INDEX).write_bytes(whole[:at])
        vouch(path)
        with pytest.raises(CheckpointError, match="incomplete or damaged"):
            checkpoint.open(path).load(state())


def test_an_index_may_ask_for_enum_members_and_nothing_else():
    """Python before 3.11.4 pickles an enum's member as a call of getattr."""
    getattr_of_index = IndexUnpickler(io.BytesIO()).find_class("builtins", "getattr")
    assert getattr_of_index(signal.Signals, "SIGTERM") is signal.SIGTERM
    for owner, name in ((signal.Signals, "mro"), (dict, "fromkeys")):
        with pytest.raises(pickle.UnpicklingError, match=name):
            getattr_of_index(owner, name)
