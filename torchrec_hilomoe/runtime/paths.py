"""Every path a user gives goes through one iopath ``PathManager``, so remote stores plug in.

A site registers its own store once, before anything is read::

    from torchrec_hilomoe.runtime.paths import path_manager
    path_manager.register_handler(MyStoreHandler())
"""

import os
from collections.abc import Mapping
from typing import cast, IO

from iopath.common.file_io import PathManager

__all__ = [
    "make_folders_for",
    "open_binary",
    "open_text",
    "path_manager",
    "remove_tree",
    "rename",
    "write_text",
]

path_manager = PathManager()


def open_text(path: str, mode: str = "r") -> IO[str]:
    """Open a text file, UTF-8, local or remote."""
    return cast(IO[str], path_manager.open(path, mode, encoding="utf-8"))


def open_binary(path: str, mode: str = "rb") -> IO[bytes]:
    """Open a binary file, local or remote."""
    return cast(IO[bytes], path_manager.open(path, mode))


def write_text(path: str, text: str) -> None:
    """Write a whole text file, local or remote."""
    with open_text(path, "w") as sink:
        sink.write(text)


def make_folders_for(files: Mapping[str, str | None]) -> None:
    """Make the folders of files that are still to be computed, so that this cannot fail afterwards.

    Args:
        files: Option to path; None where a file is not wanted.

    Raises:
        ValueError: If a path is a folder, or there cannot be a folder for it.
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


def rename(source: str, target: str) -> None:
    """Rename a file or folder to a name that is free; one step on a local disk.

    Raises:
        OSError: If the store did not do it.
    """
    if not path_manager.mv(source, target):
        raise OSError(f"could not rename {source} to {target}")


def remove_tree(path: str) -> None:
    """Remove a folder with everything in it, local or remote."""
    for name in path_manager.ls(path):
        entry = f"{path}/{name}"
        if path_manager.isdir(entry):
            remove_tree(entry)
        else:
            path_manager.rm(entry)
    # A store of objects has no folders to be left over; a disk has, and PathManager keeps them.
    if os.path.isdir(path):
        os.rmdir(path)
