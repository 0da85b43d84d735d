"""Parquet files that stay open between reads: opening one costs as much as a narrow row group.

A parsed footer takes a fiftieth of its file, so only those of open files are held: otherwise memory
would grow with the number of files.
"""

import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import finalize

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["OpenFiles", "open_parquet"]

IDLE_FILES = 16


class OpenFiles:
    """Lends open files, and keeps those that came back last.

    A file is lent to one reader at a time and opened again for a second one, so any number of
    threads may read, and any number of files.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._idle: deque[tuple[str, pq.ParquetFile]] = deque()
        finalize(self, _close_all, self._idle)

    @contextmanager
    def lend(self, path: str) -> Iterator[pq.ParquetFile]:
        """Lend a file; one that could not be read is closed, and opened again the next time.

        Args:
            path: Local, or under a registered prefix.
        """
        file = self._take(path) or open_parquet(path)
        try:
            yield file
        except BaseException:
            file.close(force=True)
            raise
        with self._lock:
            self._idle.append((path, file))
            surplus = self._idle.popleft()[1] if len(self._idle) > IDLE_FILES else None
        if surplus is not None:
            surplus.close(force=True)

    def _take(self, path: str) -> pq.ParquetFile | None:
        with self._lock:
            for entry in self._idle:
                if entry[0] == path:
                    self._idle.remove(entry)
                    return entry[1]
        return None


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a file for reading some columns of some row groups after the other."""
    handle = open_binary(path)
    local = isinstance(handle, io.BufferedReader) and isinstance(handle.raw, io.FileIO)
    if not local:
        # A remote store answers a few large requests sooner than one for each column. What was
        # fetched last stays with the file while it is open.
        return pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
    # Arrow reads a local file without coming back to Python, and so without its lock.
    with handle:
        source = pa.OSFile(handle.name)
    return pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)


def _close_all(idle: deque[tuple[str, pq.ParquetFile]]) -> None:
    while idle:
        idle.pop()[1].close(force=True)
