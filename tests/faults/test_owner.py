"""A run's folder has one owner at a time; a second one is refused, and harms nothing."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.faults import FAST, run_with
from tests.helpers.processes import ROOT
from torchrec_hilomoe.runtime import ownership
from torchrec_hilomoe.runtime.ownership import FolderInUseError, owned


@pytest.fixture
def running(tmp_path):
    """A run that is in the middle of its training, and has logged and saved."""
    argv = [sys.executable, "apps/train.py", *FAST, f"--out_dir={tmp_path}"]
    argv += ["--train.stages=null", "--train.max_steps=2000", "--train.log_every=1"]
    written = [tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "step_1"]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not all(path.exists() for path in written):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process
        process.kill()


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_second_run_is_refused_by_name_and_harms_nothing(tmp_path, running, stopped):
    """Also beside one that was stopped, and may go on."""
    if stopped:
        os.kill(running.pid, signal.SIGSTOP)
    before = (tmp_path / "config.yaml").read_bytes()
    ended = run_with(None, [f"--out_dir={tmp_path}"], ranks=2)
    assert [rank.code for rank in ended] == [2, 2]
    named = f"error: out_dir {tmp_path} is in use by process {running.pid} on "
    assert named in ended[0].shown
    assert (tmp_path / "config.yaml").read_bytes() == before
    os.kill(running.pid, signal.SIGCONT)
    os.kill(running.pid, signal.SIGTERM)
    running.communicate(timeout=120)
    assert running.returncode == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_checkpoints_have_one_owner_however_they_are_named(tmp_path, running, tmp_path_factory):
    """Also where the first run has them at their default place, and by a link."""
    other, link = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("link") / "link"
    link.symlink_to(tmp_path / "checkpoints")
    for flags in (
        [f"--out_dir={other}", f"--checkpoint.folder={tmp_path}/checkpoints"],
        [f"--out_dir={other}", f"--checkpoint.folder={link}"],
        [f"--out_dir={tmp_path}/checkpoints"],
    ):
        (ended,) = run_with(None, flags, ranks=1)
        assert ended.code == 2, ended.shown
        assert re.search(rf"error: .* is in use by process {running.pid} on ", ended.shown)
    assert running.poll() is None


def test_one_folder_may_be_a_runs_and_its_checkpoints(tmp_path):
    flags = [f"--out_dir={tmp_path}", f"--checkpoint.folder={tmp_path}/../{tmp_path.name}"]
    (ended,) = run_with(None, flags, ranks=1)
    assert ended.code == 0, ended.shown
    assert (tmp_path / "step_8").is_dir()
    assert not (tmp_path / ".owner").exists()


@pytest.mark.slow
def test_an_owner_that_was_killed_is_none(tmp_path, running):
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    flags = ["--train.stages=null", "--train.max_steps=40", "--train.log_every=50"]
    (ended,) = run_with(None, [f"--out_dir={tmp_path}", *flags, "--dry_run=false"], ranks=1)
    assert "in use" not in ended.shown
    assert ended.code == 0 or "already holds step" in ended.shown, ended.shown
    assert not (tmp_path / ".owner").exists()


def of(host, **more):
    mine = {"host": host, "process": os.getpid(), "started": "then", "born": 1}
    return json.dumps({**mine, **more})


def test_an_owner_on_another_host_is_dead_when_it_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 0.5)
    lock = tmp_path / "lock"
    lock.write_text(of("elsewhere"))
    with owned(lock, "out_dir x"):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    assert not lock.exists()


TOUCH = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1])\n    time.sleep(0.05)"


def test_an_owner_on_another_host_lives_while_it_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 20.0)
    lock = tmp_path / "lock"
    lock.write_text(of("elsewhere"))
    with subprocess.Popen([sys.executable, "-c", TOUCH, str(lock)]) as toucher:
        message = f"out_dir x is in use by process {os.getpid()} on elsewhere, since then"
        with pytest.raises(FolderInUseError, match=message), owned(lock, "out_dir x"):
            pass
        toucher.kill()


def test_where_nothing_can_be_locked_the_process_table_decides(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership, "_lock", none)
    lock, here = tmp_path / "lock", socket.gethostname()
    born = ownership._born(os.getpid())
    lock.write_text(of(here, born=born))
    with pytest.raises(FolderInUseError), owned(lock, "out_dir x"):
        pass
    lock.write_text(of(here, born=born + 1))  # another process had this number
    with owned(lock, "out_dir x"):
        pass


TAKE = """
import sys
from pathlib import Path
from torchrec_hilomoe.runtime.ownership import FolderInUseError, owned
try:
    with owned(Path(sys.argv[1]), "out_dir x"):
        print("taken")
except FolderInUseError as error:
    print(error)
"""


def taken_by_another(lock):
    argv = [sys.executable, "-c", TAKE, str(lock)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("ofd", [True, False])
def test_a_process_may_read_its_lock_and_keeps_it(tmp_path, monkeypatch, ofd):
    """A lock of the process is lost when it closes the file, however it came to open it."""
    if not ofd:
        monkeypatch.setattr(ownership, "OFD_LOCK", None)
    elif ownership.OFD_LOCK is None:
        pytest.skip("this system has no locks of open files")
    lock = tmp_path / "lock"
    with owned(lock, "out_dir x"):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "), owned(lock, "again"):
            pass
        if ofd:
            shutil.copytree(tmp_path, tmp_path.parent / "copy")
        assert f"in use by process {os.getpid()} " in taken_by_another(lock)
    assert taken_by_another(lock) == "taken\n"


FORK = """
import os, sys, time
from pathlib import Path
from torchrec_hilomoe.runtime.ownership import owned
with owned(Path(sys.argv[1]), "out_dir x"):
    child = os.fork()
    if not child and sys.argv[2] == "unwinds":
        raise SystemExit
    if not child:
        sys.stdin.read()
        os._exit(0)
    if sys.argv[2] == "unwinds":
        os.waitpid(child, 0)
        assert Path(sys.argv[1]).exists()
    else:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("child", ["unwinds", "stays"])
def test_a_forked_child_neither_ends_nor_keeps_its_parents_lock(tmp_path, child):
    lock = tmp_path / "lock"
    argv = [sys.executable, "-W", "ignore", "-c", FORK, str(lock), child]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE) as parent:
        code = parent.wait()
        assert code == (0 if child == "unwinds" else -signal.SIGKILL)
        assert taken_by_another(lock) == "taken\n"


def bind(lock):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(lock))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (os.mkdir, "a folder"),
        (lambda lock: os.symlink("/dev/null", lock), "a link"),
        (lambda lock: os.symlink("nowhere", lock), "a link"),
        (bind, "a device or a socket"),
    ],
)
def test_what_is_no_file_is_refused_by_name(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    lock = Path("lock")
    make(lock)
    named = f"out_dir x: lock is {kind}, .* Remove it"
    with pytest.raises(ValueError, match=named), owned(lock, "out_dir x"):
        pass
    assert os.path.lexists(lock)


@pytest.mark.parametrize(
    "content",
    [
        of("elsewhere")[:9],
        "[" * 5000,
        of("elsewhere", more="x" * 10_000),
        "[]",
        "null",
        of(None),
        of("else\nwhere"),
        of(socket.gethostname(), process="../self"),
        of(socket.gethostname(), process=-1),
        of("elsewhere", born=float("nan")),
        "\x00\ufffd",
    ],
    ids=itertools.count(),  # texts hold the number of this process, and workers want equal names
)
def test_what_is_no_name_is_nobodys(tmp_path, content):
    lock = tmp_path / "lock"
    lock.write_text(content)
    with owned(lock, "out_dir x"):
        assert json.loads(lock.read_text())["process"] == os.getpid()
