"""A folder of checkpoints, local or remote, and the files of one, summed while they are written."""

import io
import os
import re
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast, IO

from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase

from torchrec_hilomoe.runtime.paths import open_binary, path_manager, remove_tree, rename
from torchrec_hilomoe.training.checkpoint.errors import CheckpointError
from torchrec_hilomoe.training.checkpoint.marker import FileSum, PROGRESS_FILE

__all__ = ["Folder", "Store", "Writer", "find_damage", "latest"]

CHUNK = 2**22


def latest(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint in ``folder``, if there is one."""
    found = Folder(folder).checkpoints()
    return found[max(found)] if found else None


class Folder:
    """Holds a run's checkpoints.

    On a disk one is written under another name and renamed. A store of objects cannot rename, so
    there it is its marker, written last, that makes it one.

    Args:
        path: May not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._renames = "://" not in self.path

    def checkpoints(self) -> dict[int, str]:
        """Return the whole ones, by step."""
        return {
            step: path
            for step, path in self._named(r"step_(\d+)").items()
            if path_manager.exists(f"{path}/{PROGRESS_FILE}")
        }

    def begin(self, step: int) -> str:
        """Make room for a checkpoint, and return where its files are to be written."""
        for left_over in self._named(r"\.step_(\d+)\..*").values():
            remove_tree(left_over)  # of a process that was killed while it saved, or removed
        for path in set(self._named(r"step_(\d+)").values()) - set(self.checkpoints().values()):
            remove_tree(path)
        written = f"{self.path}/.step_{step}.partial" if self._renames else self.at(step)
        if not self._renames and path_manager.exists(written):
            self._remove(written)
        path_manager.mkdirs(written)
        return written

    def commit(self, written: str, step: int) -> str:
        """Give a checkpoint that is complete its name, and return its path."""
        final = self.at(step)
        if written != final:
            if path_manager.exists(final):
                self._remove(final)
            rename(written, final)
            _sync(self.path)
        return final

    def keep(self, newest: int, best: int | None) -> None:
        """Remove all but the newest, and the best."""
        found = self.checkpoints()
        for step in sorted(found)[:-newest]:
            if step != best:
                self._remove(found[step])

    def at(self, step: int) -> str:
        """Return the path of a step's checkpoint."""
        return f"{self.path}/step_{step}"

    def _named(self, pattern: str) -> dict[int, str]:
        names = path_manager.ls(self.path) if path_manager.isdir(self.path) else ()
        matches = [re.fullmatch(pattern, name.rstrip("/")) for name in names]
        return {int(match[1]): f"{self.path}/{match[0]}" for match in matches if match}

    def _remove(self, path: str) -> None:
        """Remove a checkpoint so that what is half removed is none."""
        if self._renames:
            removed = path.replace("/step_", "/.step_") + ".removed"
            rename(path, removed)
            remove_tree(removed)
        else:
            path_manager.rm(f"{path}/{PROGRESS_FILE}")
            remove_tree(path)


class Store(FileSystemBase):
    """DCP's file system on the package's ``PathManager``.

    Attributes:
        sums: Of the files written so far, by name.
    """

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file."""
        with open_binary(str(path), mode) as raw:
            if mode == "rb":
                yield cast(io.IOBase, raw)
                return
            stream = _Summed(raw)
            yield stream
        self.sums[os.path.basename(path)] = FileSum(bytes=stream.size, crc32=stream.crc32)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        """Join a folder and a name."""
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike) -> str:
        """Return the path as this class takes it."""
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        """Make a folder."""
        path_manager.mkdirs(str(path))

    def exists(self, path: str | os.PathLike) -> bool:
        """Return whether there is something at ``path``."""
        return path_manager.exists(str(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        """Remove a file."""
        path_manager.rm(str(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Write a file under another name: DCP does it to its index, and not every store can."""
        with open_binary(str(path)) as source, self.create_stream(new_path, "wb") as sink:
            sink.write(source.read())
        self.rm_file(path)
        self.sums.pop(os.path.basename(path), None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Accept every path: the ``PathManager`` says no by itself."""
        return True


class Writer(dcp.FileSystemWriter):
    """DCP's writer on a :class:`Store`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fs = Store()
        self.path = self.fs.init_path(path)

    @property
    def sums(self) -> dict[str, FileSum]:
        """Of the files that this rank has written."""
        assert isinstance(self.fs, Store)
        return self.fs.sums


def write_documents(folder: str, documents: Mapping[str, str]) -> dict[str, FileSum]:
    """Write texts beside the tensors, and return their sums."""
    store = Store()
    for name, text in documents.items():
        with store.create_stream(f"{folder}/{name}", "wb") as sink:
            sink.write(text.encode())
    return store.sums


def find_damage(path: str, files: Mapping[str, FileSum]) -> None:
    """Compare a checkpoint's files with their sums, shared out over the ranks; collective.

    Raises:
        CheckpointError: The same on every rank, naming each file that is not what was written.
    """
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    found: list[list[str]] = [[]] * dist.get_world_size()
    problems = [text for name in mine if (text := _difference(f"{path}/{name}", files[name]))]
    dist.all_gather_object(found, problems)
    if any(found):
        told = "; ".join(text for part in found for text in part)
        raise CheckpointError(
            f"checkpoint {path} is incomplete or damaged: {told}. Give an older one with "
            "--resume PATH."
        )


def _difference(file: str, wanted: FileSum) -> str | None:
    size, crc32 = 0, 0
    try:
        with open_binary(file) as source:
            while chunk := source.read(CHUNK):
                size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror or error})"
    if size != wanted.bytes:
        return f"{file} has {size} bytes, {wanted.bytes} were written"
    if crc32 != wanted.crc32:
        return f"the bytes of {file} are not those that were written (CRC-32)"
    return None


def _sync(folder: str) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Summed(io.RawIOBase):
    """A stream that is written from its beginning to its end, and summed."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.size = 0
        self.crc32 = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self._sink.write(data)
        view = memoryview(data)
        self.size += view.nbytes
        self.crc32 = zlib.crc32(view, self.crc32)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._sink.closed:
            self._sink.flush()

    def fileno(self) -> int:
        self._sink.flush()
        return self._sink.fileno()

    def close(self) -> None:
        self._sink.close()
        super().close()
