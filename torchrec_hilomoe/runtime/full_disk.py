"""A disk that is full is the user's to mend: one message, whichever file notices it first."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["full_disk_told"]

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_told() -> Iterator[None]:
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
