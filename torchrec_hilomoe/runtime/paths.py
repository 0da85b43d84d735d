"""Every path a user gives goes through one iopath ``PathManager``, so remote stores plug in.

A site registers its own store once, before anything is read::

    from torchrec_hilomoe.runtime.paths import path_manager
    path_manager.register_handler(MyStoreHandler())
"""

import os
from typing import cast, IO

from iopath.common.file_io import PathManager

__all__ = ["open_binary", "open_text", "path_manager", "remove_tree", "rename"]

path_manager = PathManager()


def open_text(path: str, mode: str = "r") -> IO[str]:
    """Open a text file, UTF-8, local or remote."""
    return cast(IO[str], path_manager.open(path, mode, encoding="utf-8"))


def open_binary(path: str, mode: str = "rb") -> IO[bytes]:
    """Open a binary file, local or remote."""
    return cast(IO[bytes], path_manager.open(path, mode))


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
