"""One owner of a folder at a time: a lock that names the process that holds it.

The kernel's lock of a file decides: it is gone with its process, however that ends, and a network
file system keeps it on its server, for all hosts. It is a lock of the open file (OFD) where the
kernel has those: a lock of the process would be lost as soon as anything in the process, such as a
copy of the folder, opens and closes the file. Some keep it for each host alone, or not at all.
So the owner also writes its host, process and start into the file, and touches it every few
seconds. Of an owner on this host the process table says whether it lives; one on another host is
dead when it has not touched the file for half a minute.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

__all__ = ["FolderInUseError", "owned"]

logger = logging.getLogger(__name__)

TOUCH_SECONDS = 5.0
DEAD_SECONDS = 30.0
SURELY_DEAD_SECONDS = 600.0  # clocks of two hosts never differ as much
HELD = (errno.EACCES, errno.EAGAIN)
OFD_LOCK = getattr(fcntl, "F_OFD_SETLK", None)  # Linux
WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


_held: dict[int, tuple[tuple[int, int], "_Owner"]] = {}  # by descriptor: the file, and whose


class FolderInUseError(ValueError):
    """Another process owns a folder."""


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """Who holds a lock.

    Attributes:
        host: Name of its host.
        process: Number of its process.
        started: Time at which it took the lock, for people.
        born: Time at which its process began, in ticks since the host did; 0 where unknown.
    """

    host: str
    process: int
    started: str
    born: int

    @classmethod
    def of_this_process(cls) -> "_Owner":
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        process = os.getpid()
        return cls(host=socket.gethostname(), process=process, started=now, born=_born(process))


@contextmanager
def owned(lock: Path, what: str) -> Iterator[None]:
    """Own a folder while inside.

    Args:
        lock: The file that is locked; it is made, and removed at the end.
        what: The option and the folder, for the message.

    Raises:
        FolderInUseError: If another process owns it, which is named.
        ValueError: If the file cannot be made, or is no plain file.
    """
    try:
        descriptor, locked = _open(lock, what)
    except OSError as error:
        raise ValueError(
            f"{what} cannot be written: {error.strerror or error}. Give another folder, or the "
            "right to write there."
        ) from error
    over = threading.Event()
    try:
        before = _read(descriptor)
        if before is not None and _lives(before, lock, locked=locked):
            raise _in_use(what, before)
        mine = _Owner.of_this_process()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(mine)).encode(), 0)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    _held[descriptor] = _identity(os.fstat(descriptor)), mine
    toucher = threading.Thread(target=_touch, args=(descriptor, over), daemon=True, name="owner")
    toucher.start()
    try:
        yield
    finally:
        if _held.pop(descriptor, None) is not None:  # a forked child that unwinds owns nothing
            over.set()
            toucher.join()
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _open(lock: Path, what: str) -> tuple[int, bool]:
    """Return the open file, and whether the kernel has locked it."""
    while True:
        _look(lock, what)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(lock, flags, 0o644)
        locked = True
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in HELD:
                before = _read(descriptor)
                os.close(descriptor)
                raise _in_use(what, before) from error
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            locked = False
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor, locked
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner has just ended and removed it


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise what the system says."""
    if OFD_LOCK is not None:
        try:
            fcntl.fcntl(descriptor, OFD_LOCK, WHOLE_FILE)
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # the kernel does not know them
                raise
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _look(lock: Path, what: str) -> None:
    """Refuse, before it is opened, what is no file, and what this process holds.

    To open a FIFO or a device may do anything; to close a file loses this process's lock of it,
    where there are none of open files.
    """
    try:
        found = os.lstat(lock)
    except FileNotFoundError:
        return
    for held, owner in _held.values():
        if held == _identity(found):
            raise _in_use(what, owner)
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "a device or a socket")
        raise ValueError(
            f"{what}: {lock} is {kind}, and must be a plain file, which a run makes and locks. "
            "Remove it, or give another folder."
        )


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _release_in_child() -> None:
    """Let a forked child not keep a lock of its parent's, which may end before it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _lives(before: _Owner, lock: Path, *, locked: bool) -> bool:
    """Whether an owner that left its name still lives."""
    if before.host == socket.gethostname():
        return not locked and before.born != 0 and _born(before.process) == before.born
    touched = os.stat(lock).st_mtime
    if abs(time.time() - touched) > SURELY_DEAD_SECONDS:
        return False
    logger.info("%s is of process %d on %s: is it alive?", lock, before.process, before.host)
    until = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, DEAD_SECONDS / 10))
        if os.stat(lock).st_mtime != touched:
            return True
    return False


def _read(descriptor: int) -> _Owner | None:
    """Return who is named; None if nobody is, or what is there is no name."""
    try:
        owner = _Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, RecursionError):
        return None
    texts, numbers = (owner.host, owner.started), (owner.process, owner.born)
    named = all(isinstance(it, str) and it.isprintable() for it in texts)
    return owner if named and all(type(it) is int and it >= 0 for it in numbers) else None


def _in_use(what: str, owner: _Owner | None) -> FolderInUseError:
    who = "another process"
    if owner is not None:
        who = f"process {owner.process} on {owner.host}, since {owner.started}"
    return FolderInUseError(
        f"{what} is in use by {who}. Two in one folder would spoil each other's files. Wait until "
        "it ends, stop it, or give another folder."
    )


def _born(process: int) -> int:
    """Return when a process began; with its number this tells it from any other of the host."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _touch(descriptor: int, over: threading.Event) -> None:
    while not over.wait(TOUCH_SECONDS):
        os.utime(descriptor)
