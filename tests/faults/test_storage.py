"""A full disk, a damaged shard, data that disappears: one clear message, and nothing is lost."""

import errno
import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.datasets import toy_table, write_folder
from tests.helpers.faults import run_with
from tests.helpers.runs import read_lines
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import storage

RANKS = 2


def told(ended):
    """The error of the first rank: one line, no traceback."""
    assert ended.code == 2, ended.shown
    assert "Traceback" not in ended.shown
    (line,) = [line for line in ended.shown.splitlines() if line.startswith("error: ")]
    return line


def fill_up():
    """From the third checkpoint on, the disk of rank 1 is full."""
    open_binary = storage.open_binary

    def full(path, mode="rb"):
        if mode == "wb" and "step_3" in path and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return open_binary(path, mode)

    storage.open_binary = full


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_all_and_the_run_goes_on_later(tmp_path, asynchronous):
    argv = [f"--out_dir={tmp_path}", f"--checkpoint.asynchronous={str(asynchronous).lower()}"]
    ended = run_with(fill_up, argv, ranks=RANKS)
    message = told(ended[0])
    assert re.search(r"step_3 could not be written: rank 1: .*No space left.*disk full", message)
    assert ended[1].code == 2
    assert checkpoint.latest(tmp_path / "checkpoints") == str(tmp_path / "checkpoints" / "step_2")
    again = run_with(None, argv, ranks=RANKS)
    assert "step 2 of 8" in again[0].shown
    assert again[0].code == 0


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of two megabytes, or as asked, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={getattr(request, 'param', '2m')}",
        "tmpfs",
        str(disk),
    ]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_in_earnest(tmp_path, small_disk):
    flags = [f"--out_dir={tmp_path / 'out'}", f"--checkpoint.folder={small_disk}/checkpoints"]
    (ended,) = run_with(None, flags, ranks=1)
    assert re.search(r"step_\d could not be written: .*disk full", told(ended))
    newest = checkpoint.latest(small_disk / "checkpoints")
    assert newest is not None
    assert not list((tmp_path / "out").rglob("summary.json"))


@pytest.mark.parametrize(
    "small_disk", ["24k", pytest.param("40k", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.slow
def test_a_disk_that_is_full_of_the_log(tmp_path, small_disk):
    """Whatever file notices it: curves, whose thread shows its own trace before, or the summary."""
    kept = f"--checkpoint.folder={tmp_path}/checkpoints"
    flags = [f"--out_dir={small_disk}/out", kept, "--train.log_every=1"]
    (ended,) = run_with(None, flags, ranks=1)
    assert ended.code == 2, ended.shown
    last = ended.shown.splitlines()[-1]
    assert re.match(r"error: .* cannot be written: No space left.*make room and run again", last)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    (again,) = run_with(None, flags, ranks=1)
    assert again.code == 0, again.shown
    lines = read_lines(small_disk / "out" / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("damage", [pytest.param("flipped", marks=pytest.mark.slow), "cut"])
def test_a_damaged_shard_is_told_before_anything_is_trained(finished, tmp_path, damage):
    path = shutil.copytree(finished / "checkpoints" / "step_5", tmp_path / "step_5")
    shard = path / "__0_0.distcp"
    whole = bytearray(shard.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 8  # in the middle of some table
    else:
        del whole[-100:]
    shard.write_bytes(whole)
    (ended,) = run_with(None, [f"--out_dir={tmp_path / 'out'}", f"--resume={path}"], ranks=1)
    assert re.search(r"step_5 is incomplete or damaged: .*__0_0\.distcp .*--resume", told(ended))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_data_that_breaks_while_it_is_read_is_told_with_its_file(tmp_path, ranks):
    """A thread that reads ahead fails; neither its run nor another rank must wait for it."""
    sizes = {"train": [64, 64, 64], "valid": [20], "test": [20]}
    data = write_folder(
        tmp_path / "data",
        {split: [toy_table(rows) for rows in counts] for split, counts in sizes.items()},
    )
    broken = sorted((data / "train").glob("*.parquet"))[1]
    content = bytearray(broken.read_bytes())
    content[4 : len(content) // 3] = os.urandom(len(content) // 3 - 4)  # the footer is whole
    broken.write_bytes(content)
    flags = ["--model.embedding_dim=4", "--train.max_steps=6", "--train.stages=null"]
    argv = [f"--out_dir={tmp_path / 'out'}", f"--data.path={data}", *flags]
    ended = run_with(None, argv, ranks=ranks)
    lines = [line for rank in ended for line in rank.shown.splitlines() if "error: " in line]
    assert not [rank.shown for rank in ended if "Traceback" in rank.shown]
    assert len(lines) == ranks, lines
    (found,) = [line for line in lines if broken.name in line]
    others = [line for line in lines if line != found]
    assert all("another rank has ended or does not answer" in line for line in others)
    assert sorted(rank.code for rank in ended) == [1] * (ranks - 1) + [2]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_loss_that_is_no_number_is_told_once_with_its_place(tmp_path, ranks):
    flags = ["--train.learning_rate=1e30", "--checkpoint.every_steps=4"]
    ended = run_with(None, [f"--out_dir={tmp_path}", *flags], ranks=ranks)
    assert [rank.code for rank in ended] == [1] * ranks
    (line,) = [text for text in ended[0].shown.splitlines() if text.startswith("error: ")]
    assert re.search(
        r"loss is (nan|inf) at step \d on rank \d, .* ends at LoaderState\(epoch=", line
    )
    assert checkpoint.latest(tmp_path / "checkpoints") is None
