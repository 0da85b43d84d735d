"""A folder of checkpoints, local or remote, and the files of one: written, summed, read safely.

DCP's index is unpickled from a closed list of classes: nothing in it is executed.
"""

import io
import os
import pickle
import re
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, cast, IO

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata

from torchrec_hilomoe.runtime.documents import check_plain, DocumentError
from torchrec_hilomoe.runtime.paths import (
    open_binary,
    path_manager,
    remove_tree,
    rename,
    sync_folder,
)
from torchrec_hilomoe.training.checkpoint.manifest import (
    CheckpointError,
    FileChecksum,
    PROGRESS_FILE,
)

__all__ = [
    "Folder",
    "IndexUnpickler",
    "Reader",
    "Store",
    "find",
    "find_difference",
    "latest",
    "verify_checksums",
]

CHUNK = 2**22
CHECKPOINT = r"step_(0|[1-9][0-9]*)"  # as :meth:`Folder.at` names it
LEFT_OVER = r"\.step_([0-9]+)\..*"


def latest(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint in ``folder``, if there is one."""
    found = Folder(folder).checkpoints()
    return found[max(found)] if found else None


def find(folder: str | Path, step: int) -> str | None:
    """Return the whole checkpoint of a step in ``folder``, if it is there."""
    return Folder(folder).checkpoints().get(step)


class Folder:
    """Holds a run's checkpoints.

    On a disk one is written under another name and renamed. A store of objects cannot rename, so
    there it is its manifest, written last, that makes it one.

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
            for step, path in self._named(CHECKPOINT)
            if path_manager.exists(f"{path}/{PROGRESS_FILE}")
        }

    def begin(self, step: int) -> None:
        """Make room for a checkpoint, whose files are to be written to :meth:`partial`."""
        for _, left_over in self._named(LEFT_OVER):
            remove_tree(left_over)  # of a process that was killed while it saved, or removed
        for _, path in set(self._named(CHECKPOINT)) - set(self.checkpoints().items()):
            remove_tree(path)
        written = self.partial(step)
        if not self._renames and path_manager.exists(written):
            self._remove(written)
        path_manager.mkdirs(written)

    def commit(self, written: str, step: int) -> str:
        """Give a checkpoint that is complete its name, and return its path."""
        final = self.at(step)
        if written != final:
            if path_manager.exists(final):
                self._remove(final)
            rename(written, final)
            sync_folder(self.path)
        return final

    def keep(self, newest: int, best: int | None, step: int) -> None:
        """Remove all but the newest up to ``step``, and the best.

        Later ones are of a run that has gone on from before them, because they are damaged.
        """
        found = {number: path for number, path in self.checkpoints().items() if number <= step}
        for step in sorted(found)[:-newest]:
            if step != best:
                self._remove(found[step])

    def at(self, step: int) -> str:
        """Return the path of a step's checkpoint."""
        return f"{self.path}/step_{step}"

    def partial(self, step: int) -> str:
        """Return where the files of a step's checkpoint are written, before it is whole."""
        return f"{self.path}/.step_{step}.partial" if self._renames else self.at(step)

    def _named(self, pattern: str) -> list[tuple[int, str]]:
        """Return the steps and the paths of what is named like this."""
        names = path_manager.ls(self.path) if path_manager.isdir(self.path) else ()
        matches = [re.fullmatch(pattern, name.rstrip("/")) for name in names]
        return [(int(match[1]), f"{self.path}/{match[0]}") for match in matches if match]

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
        checksums: Checksums of the files written so far, by name.
    """

    def __init__(self) -> None:
        self.checksums: dict[str, FileChecksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file."""
        with open_binary(str(path), mode) as raw:
            if mode == "rb":
                yield cast(io.IOBase, raw)
                return
            stream = _Checksummed(raw)
            yield stream
        self.checksums[os.path.basename(path)] = FileChecksum(bytes=stream.size, crc32=stream.crc32)

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
        self.checksums.pop(os.path.basename(path), None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Accept every path: the ``PathManager`` says no by itself."""
        return True


def verify_checksums(path: str, files: Mapping[str, FileChecksum]) -> None:
    """Compare a checkpoint's files with their sums, shared out over the ranks; collective.

    Raises:
        CheckpointError: The same on every rank, naming each file that is not what was written.
    """
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    found: list[list[str]] = [[]] * dist.get_world_size()
    problems = [text for name in mine if (text := find_difference(f"{path}/{name}", files[name]))]
    dist.all_gather_object(found, problems)
    if any(found):
        told = "; ".join(text for part in found for text in part)
        raise CheckpointError(
            f"checkpoint {path} is incomplete or damaged: {told}. Give an older one with "
            "--resume PATH."
        )


def find_difference(file: str, wanted: FileChecksum) -> str | None:
    """Say in which way a file is not what was written; None if it is."""
    size, crc32 = 0, 0
    try:
        check_plain(file)
        with open_binary(file) as source:
            while chunk := source.read(CHUNK):
                size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    except DocumentError as error:
        return str(error)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror or error})"
    if size != wanted.bytes:
        return f"{file} has {size} bytes, {wanted.bytes} were written"
    if crc32 != wanted.crc32:
        return f"the bytes of {file} are not those that were written (CRC-32)"
    return None


class _Checksummed(io.RawIOBase):
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


DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class Reader(dcp.FileSystemReader):
    """DCP's reader on the package's ``PathManager``, with a safe index.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fs = Store()
        self.path = self.fs.init_path(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            pickle.UnpicklingError: If it is garbled, or names what it may not.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as source:
            try:
                metadata = IndexUnpickler(source).load()
            except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
                raise pickle.UnpicklingError(f"the index is garbled: {error!r}") from error
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the index is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def non_finite(self, rank: int, world_size: int) -> list[str]:
        """Return names of tensors with a value that is no number, in a rank's share of the pieces.

        They are read one piece at a time, so that a large checkpoint takes little memory.

        Raises:
            pickle.UnpicklingError: If a piece is no tensor.
        """
        pieces = sorted(self.read_metadata().storage_data.items(), key=lambda it: repr(it[0]))
        found = []
        for index, place in pieces[rank::world_size]:
            with self.fs.create_stream(f"{self.path}/{place.relative_path}", "rb") as source:
                source.seek(place.offset)
                piece = io.BytesIO(source.read(place.length))
            tensor = torch.load(piece, weights_only=True, map_location="cpu")
            if not isinstance(tensor, torch.Tensor):
                raise pickle.UnpicklingError(f"{index.fqn} is no tensor")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                found.append(index.fqn)
        return found


def _enum_member(kind: Any, name: str) -> Enum:
    """Stand in for ``getattr`` in an index, where it may do nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"the index asks for {name!r} of {kind!r}")
    return kind[name]


class IndexUnpickler(pickle.Unpickler):
    """Makes data only: exact names, because a dotted one could reach any function through them."""

    ALLOWED = frozenset(
        {("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__}
        | {
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
        | {("torch", str(dtype).rpartition(".")[2]) for dtype in DTYPES}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the list."""
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python before 3.11.4 pickles one
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is not allowed")
