"""Every path a user gives goes through one iopath ``PathManager``, so remote stores plug in.

A site registers its own store once, before anything is read::

    from torchrec_hilomoe.runtime.paths import path_manager
    path_manager.register_handler(MyStoreHandler())
"""

from typing import IO

from iopath.common.file_io import PathManager

__all__ = ["open_binary", "open_text", "path_manager"]

path_manager = PathManager()


def open_text(path: str, mode: str = "r") -> IO[str]:
    """Open a text file, UTF-8, local or remote."""
    return path_manager.open(path, mode, encoding="utf-8")


def open_binary(path: str, mode: str = "rb") -> IO[bytes]:
    """Open a binary file, local or remote."""
    return path_manager.open(path, mode)
