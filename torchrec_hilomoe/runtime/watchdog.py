"""Ending a process that makes no progress, with the stacks that say where it stands.

Every rank watches itself. When one is stuck the others wait for it, so that all of them show where
they stand before the first of them ends.

``faulthandler.dump_traceback_later(seconds, exit=True)`` at every beat cannot stand in for the
thread here. It ends the process at once, so that a launcher kills the other ranks before they have
shown their stacks, and it can say no sentence with a remedy; it is only what is left where the
thread cannot run.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

__all__ = ["Watchdog"]

T = TypeVar("T")

STDERR = 2  # sys.stderr may be anything, or locked by what is stuck
GRACE = 3.0  # seconds in which the other ranks show their stacks too


class Watchdog:
    """Ends the process when :meth:`beat` has not been called for too long.

    Args:
        seconds: The limit; None watches nothing.
        name: Who is watched, for the message.
    """

    def __init__(self, seconds: float | None, name: str = "this process") -> None:
        self._seconds = seconds
        self._name = name
        self._every = min(1.0, (seconds or 1.0) / 4)
        self._last = time.monotonic()
        self._paused = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self.beat()
            self._arm()
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def beat(self) -> None:
        """Say that something was finished; costs a read of the clock."""
        self._last = time.monotonic()

    def over(self, parts: Iterable[T]) -> Iterator[T]:
        """Pass parts of a long work on, and say so when the next one is asked for."""
        for part in parts:
            yield part
            self.beat()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing inside, as while a file is written that is as slow as its store."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat()
            self._paused -= 1

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._over.wait(self._every):
            self._arm()
            if not self._paused and time.monotonic() - self._last > self._seconds:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Where the thread cannot run, because another keeps the interpreter's lock, this can."""
        assert self._seconds is not None
        faulthandler.dump_traceback_later(
            self._seconds + GRACE + self._every, exit=True, file=STDERR
        )

    def _end(self) -> None:
        told = (
            f"error: {self._name} has finished nothing for {self._seconds:g} s (stall_seconds). It "
            "is stuck, or waits for a rank that is. Its threads stand at:\n"
        )
        os.write(STDERR, told.encode())
        faulthandler.dump_traceback(STDERR, all_threads=True)
        time.sleep(GRACE)
        os._exit(1)  # what is stuck cannot be asked to clean up
