"""Every path a user gives goes through one iopath ``PathManager``, so remote stores plug in.

A site registers its own store once, before anything is read::

    from torchrec_hilomoe.runtime.paths import path_manager

    path_manager.register_handler(MyStoreHandler())
"""

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import Any, cast, IO

from iopath.common.file_io import PathManager

__all__ = [
    "explain_full_disk",
    "explain_unwritten",
    "make_folders_for",
    "open_binary",
    "open_text",
    "path_manager",
    "remove_tree",
    "rename",
    "sync_folder",
    "to_json",
    "write_text",
]

logger = logging.getLogger(__name__)

path_manager = PathManager()

FULL = (errno.ENOSPC, errno.EDQUOT)


def open_text(path: str, mode: str = "r") -> IO[str]:
    """Open a text file, UTF-8, local or remote."""
    return cast(IO[str], path_manager.open(path, mode, encoding="utf-8"))


def open_binary(path: str, mode: str = "rb") -> IO[bytes]:
    """Open a binary file, local or remote."""
    return cast(IO[bytes], path_manager.open(path, mode))


def write_text(path: str, text: str) -> None:
    """Write a text file that is whole or as it was, local or remote.

    On a disk it is written beside, synced and renamed; a store of objects takes it whole or not.
    """
    if "://" in path:
        with open_text(path, "w") as sink:
            sink.write(text)
        return
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise
    sync_folder(folder or ".")


def sync_folder(folder: str) -> None:
    """Make a rename inside a folder of a disk last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Serialise as strict JSON: a number that is none is null.

    Example:
        >>> to_json({"auc": float("nan"), "rows": 3}, indent=None)
        '{"auc": null, "rows": 3}'
    """
    return json.dumps(_nulled(value), indent=indent, allow_nan=False)


def _nulled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _nulled(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folders_for(files: Mapping[str, str | None]) -> None:
    """Make the folders of files that are still to be computed, so that this cannot fail afterwards.

    Args:
        files: Option to path; None where a file is not wanted.

    Raises:
        ValueError: If a path is a folder, there cannot be a folder for it, or nobody may write
            there.
    """
    for option, path in files.items():
        if path is None:
            continue
        if path_manager.isdir(path):
            raise ValueError(f"{option} {path} is a folder. Name a file, in it or elsewhere.")
        folder = os.path.dirname(path) or "."
        try:
            if path_manager.isfile(folder):
                raise NotADirectoryError(f"{folder} is a file")
            path_manager.mkdirs(folder)
        except OSError as error:
            raise ValueError(
                f"{option} {path}: its folder cannot be made: {error}. Name another place."
            ) from error
        if "://" in path:
            continue
        with explain_unwritten(option, path):
            with TemporaryFile(dir=folder):
                pass
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise PermissionError("it is read-only")


@contextmanager
def explain_unwritten(option: str, path: str) -> Iterator[None]:
    """Name the file that a user gave, and its option, where it cannot be written inside.

    Raises:
        ValueError: In place of the system's error, which may name another file, or none.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written: {error.strerror or error}. Name another place."
        ) from error


def rename(source: str, target: str) -> None:
    """Rename a file or folder to a name that is free; one step on a local disk.

    Raises:
        OSError: If the store did not do it.
    """
    if not path_manager.mv(source, target):
        raise OSError(f"could not rename {source} to {target}")


def remove_tree(path: str) -> None:
    """Remove a folder with everything in it, local or remote; or a file, or a link.

    What a link points to is left: it may be anything, and anybody's.
    """
    if os.path.islink(path):
        logger.warning("%s is a link: it is removed, and what it points to is left", path)
    if os.path.islink(path) or (os.path.lexists(path) and not os.path.isdir(path)):
        os.remove(path)
        return
    for name in path_manager.ls(path):
        entry = f"{path}/{name}"
        if path_manager.isdir(entry) and not os.path.islink(entry):
            remove_tree(entry)
        else:
            path_manager.rm(entry)
    # A store of objects has no folders to be left over; a disk has, and PathManager keeps them.
    if os.path.isdir(path):
        os.rmdir(path)


@contextmanager
def explain_full_disk() -> Iterator[None]:
    """Say what to do when a disk, or a quota of it, is used up inside.

    Raises:
        ValueError: In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or "a file of the run"
        raise ValueError(
            f"{where} cannot be written: {error.strerror}. Checkpoints that were saved are whole; "
            "make room and run again to go on from the newest."
        ) from error
