"""A prepared folder appears whole or not at all, and nothing of the user's is lost."""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import SCHEMA, toy_table
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.prepare import folder as folder_module
from torchrec_hilomoe.data.prepare.folder import prepared_folder

TABLE = toy_table(50)


def write(out, *, overwrite=False, fail=False):
    with prepared_folder(str(out), overwrite=overwrite) as folder:
        folder.write_schema(SCHEMA)
        split = folder.write_split(
            "train", 50, lambda start, stop: TABLE.slice(start, stop - start)
        )
        if fail:
            raise RuntimeError("the raw files are gone")
    return split


def test_rows_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr(folder_module, "ROWS_PER_FILE", 16)
    split = write(tmp_path / "out")
    assert split.rows == 50
    assert split.label_rate == sum(TABLE["label"].to_pylist()) / 50
    paths = sorted((tmp_path / "out" / "train").iterdir())
    footers = [pq.read_metadata(path) for path in paths]
    groups = [
        footer.row_group(group).num_rows
        for footer in footers
        for group in range(footer.num_row_groups)
    ]
    assert groups == [8, 8, 8, 8, 8, 8, 2]
    assert len(list((tmp_path / "out" / "train").iterdir())) == 4
    assert pq.read_table(tmp_path / "out" / "train") == TABLE


def test_a_split_without_rows_keeps_its_columns(tmp_path):
    with prepared_folder(str(tmp_path / "out"), overwrite=False) as folder:
        folder.write_schema(SCHEMA)
        split = folder.write_split("train", 0, lambda start, stop: TABLE.slice(0, 0))
    assert (split.rows, split.label_rate) == (0, None)
    assert pq.read_table(tmp_path / "out" / "train").schema == TABLE.schema


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="raw files are gone"):
        write(tmp_path / "out", fail=True)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_folder(tmp_path):
    write(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(RuntimeError, match="raw files are gone"):
        write(tmp_path / "out", overwrite=True, fail=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_is_asked_for(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(DataError, match=r"out holds prepared data already.*--overwrite"):
        write(tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    write(tmp_path / "out/", overwrite=True)
    assert not (tmp_path / "out" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds files that are no prepared data"):
        write(tmp_path, overwrite=True)
    with pytest.raises(DataError, match=r"thesis\.tex is a file"):
        write(tmp_path / "thesis.tex", overwrite=True)
    with pytest.raises(DataError, match="--out is empty"):
        write("", overwrite=True)


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert ParquetSource(str(tmp_path / "out"), "train").block_rows == (50,)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_process_is_refused(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "out")]
    repository = Path(__file__).parents[4]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with pytest.raises(DataError, match=rf"is being prepared by process {process.pid} at this"):
            write(tmp_path / "out")
        write(tmp_path / "other")
        process.send_signal(signal.SIGKILL)
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def set_aside(out):
    """What a process leaves that died between two renames, of the old folder and of the new one."""
    write(out)
    out.rename(out.with_name(f"{out.name}.prepare-old-1"))


@pytest.mark.parametrize("empty", [False, True])
def test_old_data_that_a_killed_process_had_set_aside_come_back(tmp_path, empty):
    set_aside(tmp_path / "out")
    if empty:
        (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="raw files are gone"):
        write(tmp_path / "out", overwrite=True, fail=True)
    assert ParquetSource(str(tmp_path / "out"), "train").block_rows == (50,)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_data_that_came_back_are_replaced_only_if_that_is_asked_for(tmp_path):
    set_aside(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(DataError, match=r"out holds prepared data already.*--overwrite"):
        write(tmp_path / "out")
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert sorted(after.values()) == sorted(before.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_data_that_were_half_removed_do_not_stay(tmp_path, monkeypatch):
    """A process was killed while it removed what it had replaced, and with it what tells data."""
    write(tmp_path / "out")

    def half(path):
        (Path(path) / "schema.json").unlink()
        (Path(path) / "_SUCCESS").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(folder_module, "remove_tree", half)
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            write(tmp_path / "out", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_neighbour_is_nobodys_leftover_whatever_its_name(tmp_path, there, kind):
    """Folders of a user, files and links among them; a year may be the id of a process, too."""
    names = ["out.old-2024", "out.old-x", "out.partial-7", "out.partial-notes", "out.prepare-old-7"]
    names += ["out.prepare-partial-notes", "out.prepare-old-", "out.prepare-old-7.bak"]
    names += ["other.prepare-partial-7", "XXout.prepare-partial-7"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    if kind != "folder":  # what this package leaves is a folder
        names.append("out.prepare-partial-7")
    for name in names:
        if kind == "folder":
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.tex").write_text("years of work")
        elif kind == "file":
            (tmp_path / name).write_text("years of work")
        else:
            (tmp_path / name).symlink_to(tmp_path / "theirs")
    if there:
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=there)
    assert ParquetSource(str(tmp_path / "out"), "train").block_rows == (50,)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "out", "theirs"])
    for name in (*names, "theirs"):
        path = tmp_path / name
        path = path if path.is_file() else path / "thesis.tex"
        assert path.read_text() == "years of work"


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def write_slowly():
        with prepared_folder(str(tmp_path / "out"), overwrite=True) as folder:
            folder.write_schema(SCHEMA)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").touch()

    with pytest.raises(DataError, match="holds files that are no prepared data"):
        write_slowly()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link(tmp_path, there):
    """What it points to is replaced, on whatever disk that is."""
    (tmp_path / "disk").mkdir()
    if there:
        write(tmp_path / "disk" / "data")
        (tmp_path / "disk" / "data" / "stale").touch()
    (tmp_path / "out").symlink_to("disk/data")
    write(tmp_path / "out", overwrite=there)
    assert (tmp_path / "out").is_symlink()
    assert ParquetSource(str(tmp_path / "out"), "train").block_rows == (50,)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]
    assert not (tmp_path / "disk" / "data" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


SLOW = """
import sys, time
from tests.helpers.datasets import SCHEMA, toy_table
from torchrec_hilomoe.data.prepare.folder import prepared_folder
with prepared_folder(sys.argv[1], overwrite=False) as folder:
    folder.write_schema(SCHEMA)
    folder.write_split("train", 9, lambda start, stop: toy_table(stop - start))
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_nothing_that_looks_done(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "out")]
    repository = Path(__file__).parents[4]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name == f"out.prepare-partial-{process.pid}"
    with pytest.raises(DataError, match=r"not a whole data folder: _SUCCESS is missing"):
        ParquetSource(str(left), "train")
    write(tmp_path / "out")
    assert ParquetSource(str(tmp_path / "out"), "train").block_rows == (50,)
