"""A local folder for what waits on its way from raw files to a prepared folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from torchrec_hilomoe.data.prepare.folder import PreparedFolder

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder(folder: PreparedFolder, wanted: str | None) -> Iterator[str]:
    """Give a local folder that is removed again, also after an error.

    Args:
        folder: What is being made: beside it there is room, unless it is remote.
        wanted: Where the user wants it; ``None`` leaves it to this function.

    Yields:
        Its path.
    """
    beside = folder.path if os.path.isdir(folder.path) else None
    path = tempfile.mkdtemp(prefix=".scratch-", dir=wanted or beside)
    try:
        yield path
    finally:
        shutil.rmtree(path)
