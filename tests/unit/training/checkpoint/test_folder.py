"""What lies in a folder of checkpoints is cleared away, and nothing outside it is touched."""

import logging
import os
import shutil

import pytest

from tests.helpers.checkpoints import save
from torchrec_hilomoe.training import checkpoint

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def precious(tmp_path):
    """A folder elsewhere, of files that are no run's."""
    folder = tmp_path / "elsewhere" / "precious"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")
    return folder


def content(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


@pytest.mark.parametrize("name", ["step_100", ".step_9.removed", ".step_2.partial"])
def test_a_link_is_removed_and_what_it_points_to_is_left(tmp_path, precious, caplog, name):
    folder = tmp_path / "run"
    folder.mkdir()
    os.symlink(precious, folder / name)
    with caplog.at_level(logging.WARNING):
        save(folder, 2)
    assert content(precious) == {"a.txt", "sub", "sub/b.txt"}
    assert os.listdir(folder) == ["step_2"]
    assert f"{folder / name} is a link: it is removed, and what it points to is left" in caplog.text


def test_a_link_in_a_folder_that_is_removed_is_not_followed(tmp_path, precious):
    (tmp_path / "run" / "step_1").mkdir(parents=True)
    os.symlink(precious, tmp_path / "run" / "step_1" / "inner")
    save(tmp_path / "run", 2)
    assert content(precious) == {"a.txt", "sub", "sub/b.txt"}
    assert os.listdir(tmp_path / "run") == ["step_2"]


def test_a_checkpoint_on_another_disk_is_left_there_when_its_turn_has_come(tmp_path):
    moved = tmp_path / "elsewhere" / "step_2"
    moved.parent.mkdir()
    shutil.move(save(tmp_path / "run", 2), moved)
    before = content(moved)
    os.symlink(moved, tmp_path / "run" / "step_2")
    newest = save(tmp_path / "run", 4, keep=1)
    assert os.listdir(tmp_path / "run") == ["step_4"]
    assert content(moved) == before
    assert checkpoint.open(newest).progress.step == 4
    assert checkpoint.open(moved).progress.step == 2


@pytest.mark.parametrize("name", ["step_9", "step_1", ".step_1.removed", ".step_9.partial"])
@pytest.mark.parametrize("kind", ["file", "dangling", "pipe"])
def test_what_is_no_folder_is_cleared_away(tmp_path, name, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "file":
        (folder / name).touch()
    elif kind == "dangling":
        os.symlink("nowhere", folder / name)
    else:
        os.mkfifo(folder / name)
    save(folder, 1)
    save(folder, 2, keep=1)
    assert os.listdir(folder) == ["step_2"]


def test_two_left_overs_of_a_step_are_both_cleared_away(tmp_path):
    for name in (".step_1.partial", ".step_1.removed"):
        (tmp_path / "run" / name).mkdir(parents=True)
    save(tmp_path / "run", 2)
    assert os.listdir(tmp_path / "run") == ["step_2"]


def test_a_name_that_no_run_gives_is_left_alone(tmp_path):
    (tmp_path / "run" / "step_002").mkdir(parents=True)
    save(tmp_path / "run", 2)
    assert sorted(os.listdir(tmp_path / "run")) == ["step_002", "step_2"]
