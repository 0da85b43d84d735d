"""Checkpoints in a store of the user's own: no rename, no append, no folders but by name."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from iopath.common.file_io import PathHandler

from tests.helpers.checkpoints import progress, state, tensors
from torchrec_hilomoe.runtime.paths import path_manager
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError, Saver

pytestmark = pytest.mark.usefixtures("alone")

PREFIX = "shelf://"


class _Upload(io.BytesIO):
    """Becomes an object when it is closed, as with the stores of clouds."""

    def __init__(self, objects: dict[str, bytes], name: str) -> None:
        super().__init__()
        self._objects, self._name = objects, name

    def close(self) -> None:
        if not self.closed:
            self._objects[self._name] = self.getvalue()
        super().close()


class Shelf(PathHandler):
    """Objects by name, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if "w" in mode:
            raw: io.BytesIO = _Upload(self.objects, path)
        elif path in self.objects:
            raw = io.BytesIO(self.objects[path])
        else:
            raise FileNotFoundError(2, "No such object", path)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return path in self.objects or self._isdir(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path in self.objects

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return any(name.startswith(path.rstrip("/") + "/") for name in self.objects)

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        below = path.rstrip("/") + "/"
        names = (name.removeprefix(below) for name in self.objects if name.startswith(below))
        return sorted({name.partition("/")[0] for name in names})

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        """There is nothing to make."""

    def _rm(self, path: str, **kwargs: Any) -> None:
        del self.objects[path]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    """Registered once, as a site does."""
    handler = Shelf()
    path_manager.register_handler(handler)
    return handler


@pytest.fixture
def folder(shelf: Shelf) -> Iterator[str]:
    yield f"{PREFIX}team/run/checkpoints"
    shelf.objects.clear()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_remote_checkpoint_comes_back_and_old_ones_go(folder, shelf, asynchronous):
    saver = Saver(folder, keep=2, asynchronous=asynchronous, documents={"plan.txt": "a plan"})
    for step in (1, 2, 3, 4):
        saver.save(state(float(step)), progress(step, best=1))
    saver.wait()
    assert path_manager.ls(folder) == ["step_1", "step_3", "step_4"]
    newest = f"{folder}/step_4"
    assert checkpoint.latest(folder) == newest
    assert checkpoint.open(newest).document("plan.txt") == "a plan"
    loaded = state(0.0)
    checkpoint.open(newest).load(loaded)
    for got, want in zip(tensors(loaded), tensors(state(4.0)), strict=True):
        assert torch.equal(got, want)


def test_without_its_marker_a_remote_folder_is_no_checkpoint(folder, shelf):
    saver = Saver(folder)
    saver.save(state(), progress(1))
    saver.save(state(), progress(2))
    del shelf.objects[f"{folder}/step_2/progress.json"]
    assert checkpoint.latest(folder) == f"{folder}/step_1"
    saver.save(state(3.0), progress(2))
    assert checkpoint.latest(folder) == f"{folder}/step_2"


def test_a_damaged_object_is_told(folder, shelf):
    Saver(folder).save(state(), progress(1))
    name = f"{folder}/step_1/__0_0.distcp"
    whole = shelf.objects[name]
    shelf.objects[name] = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    with pytest.raises(CheckpointError, match="the bytes of shelf://.*distcp are not those"):
        checkpoint.open(f"{folder}/step_1").load(state())
