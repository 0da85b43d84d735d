"""Saving: whole or absent, the newest and the best kept, no torn tensor in the background."""

import errno
import resource
import threading
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import progress, save, state, tensors
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError, Saver
from torchrec_hilomoe.training.checkpoint import saver as saver_module

pytestmark = pytest.mark.usefixtures("alone")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_progress_and_documents_come_back(tmp_path):
    path = save(tmp_path, step=7, documents={"plan.txt": "table item: everywhere\n"})
    assert path == str(tmp_path / "step_7")
    assert checkpoint.open(path).progress == progress(7)
    assert checkpoint.open(path).document("plan.txt") == "table item: everywhere\n"
    loaded = state(0.0)
    assert not checkpoint.open(path).load(loaded).rank_state
    for got, want in zip(tensors(loaded), tensors(state(7.0)), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_an_open_window_comes_back(tmp_path):
    saved = {
        "window": torch.arange(12).reshape(4, 3),
        "choices": {"head.rank.0": torch.tensor([[3, 5]])},
    }
    Saver(tmp_path).save(state(), progress(3), rank_state=saved)
    found = checkpoint.open(tmp_path / "step_3").load(state()).rank_state
    assert torch.equal(found["window"], saved["window"])
    assert found["choices"].keys() == saved["choices"].keys()
    assert torch.equal(found["choices"]["head.rank.0"], saved["choices"]["head.rank.0"])


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.rand(5)
    path = save(tmp_path)
    want = torch.rand(9)
    torch.manual_seed(1)
    checkpoint.open(path).load(state())
    assert torch.equal(torch.rand(9), want)
    other = torch.rand(9)
    torch.manual_seed(1)
    checkpoint.open(path).load(state(), restore_random=False)
    assert not torch.equal(torch.rand(9), other)


def test_only_the_newest_are_kept(tmp_path):
    saver = Saver(tmp_path, keep=3)
    for step in (2, 9, 10, 11):
        saver.save(state(), progress(step))
    assert names(tmp_path) == ["step_10", "step_11", "step_9"]
    assert checkpoint.latest(tmp_path) == str(tmp_path / "step_11")
    save(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["step_100"]


def test_the_best_is_kept_besides(tmp_path):
    saver = Saver(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        saver.save(state(), progress(step, best))
    assert names(tmp_path) == ["step_2", "step_4", "step_5"]
    saver.save(state(), progress(6, best=6))
    assert names(tmp_path) == ["step_5", "step_6"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, tensors=state(5.0))
    loaded = state(0.0)
    checkpoint.open(path).load(loaded)
    assert torch.equal(loaded["model"]["weight"], torch.full((3, 5), 5.0))
    assert names(tmp_path) == ["step_1"]


def test_an_unfinished_folder_is_no_checkpoint_and_is_cleared_away(tmp_path):
    """What a process leaves that was killed while it saved."""
    assert checkpoint.latest(tmp_path / "absent") is None
    Path(save(tmp_path, 4)).rename(tmp_path / ".step_4.partial")
    (Path(save(tmp_path, 3)) / "progress.json").unlink()
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == str(tmp_path / "step_2")
    assert names(tmp_path) == ["step_2"]


def test_what_is_saved_in_the_background_is_the_moment_of_saving(tmp_path, monkeypatch):
    """Training changes the tensors while they are written."""
    begun, go_on = threading.Event(), threading.Event()
    begin = saver_module.Folder.begin

    def slow(folder, step):  # no tensor has been written yet
        begun.set()
        assert go_on.wait(30)
        begin(folder, step)

    monkeypatch.setattr(saver_module.Folder, "begin", slow)
    trained, told = state(1.0), []
    saver = Saver(tmp_path, asynchronous=True, on_saved=told.append)
    saver.save(trained, progress(1))
    assert begun.wait(30)
    for tensor in tensors(trained):
        tensor.fill_(9)
    assert checkpoint.latest(tmp_path) is None
    assert told == []
    go_on.set()
    saver.save(trained, progress(2))  # waits for the first
    saver.wait()
    for step, fill in ((1, 1.0), (2, 9.0)):
        loaded = state(0.0)
        checkpoint.open(tmp_path / f"step_{step}").load(loaded)
        for got, want in zip(tensors(loaded), tensors(state(fill)), strict=True):
            assert torch.equal(got, want)
    assert [saved.step for saved in told] == [1, 2]
    files = sum(path.stat().st_size for path in (tmp_path / "step_2").iterdir())
    manifest = (tmp_path / "step_2" / "progress.json").stat().st_size
    assert told[1].bytes == files - manifest


def test_a_failure_in_the_background_is_told_and_the_run_can_go_on(tmp_path, monkeypatch):
    saver = Saver(tmp_path, asynchronous=True)
    write = saver_module.write_manifest

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver_module, "write_manifest", full)
    saver.save(state(), progress(1))
    with pytest.raises(CheckpointError, match="step_1 could not be written.*No space.*disk full"):
        saver.wait()
    assert not saver.failed
    assert checkpoint.latest(tmp_path) is None
    monkeypatch.setattr(saver_module, "write_manifest", write)
    saver.save(state(), progress(2))
    saver.wait()
    assert names(tmp_path) == ["step_2"]


def test_a_failure_shows_before_the_next_save(tmp_path):
    (tmp_path / "file").touch()
    saver = Saver(tmp_path / "file" / "checkpoints", asynchronous=True)
    assert not saver.failed
    saver.save(state(), progress(1))
    saver.close()
    assert saver.failed


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path, asynchronous):
    save(tmp_path, 1)
    large = {"model": {"weight": torch.ones(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(tmp_path, keep=1, asynchronous=asynchronous)

    def save_large() -> None:
        saver.save(large, progress(2))
        saver.wait()

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files cannot be written
    try:
        with pytest.raises(CheckpointError, match="step_2 could not be written: .*disk full"):
            save_large()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(tmp_path) == str(tmp_path / "step_1")
    checkpoint.open(tmp_path / "step_1").load(state())
