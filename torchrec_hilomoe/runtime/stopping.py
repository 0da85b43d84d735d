"""Stopping between two steps when the scheduler, or a person, asks for it."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import distributed as dist

__all__ = ["StopSignal"]

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
ASK_EVERY = 10  # steps between two agreements of several ranks: one small all-reduce


class StopSignal:
    """Notices SIGTERM and Ctrl-C; all ranks agree on the step to stop after.

    The first signal is kept for :meth:`requested`; a later one acts as it always does.

    Args:
        echo_seconds: A signal within so many seconds of the first is the same one: a launcher
            passes on to its ranks what the terminal, or the scheduler, sent to them as well.
    """

    def __init__(self, echo_seconds: float = 2.0) -> None:
        self._echo_seconds = echo_seconds
        self._asked_at: float | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def requested(self, step: int, *, urgent: bool = False) -> bool:
        """Return whether to stop after ``step``, the same on every rank; a collective call.

        Args:
            step: Steps done.
            urgent: Whether this rank has a reason of its own.
        """
        wanted = urgent or self._asked_at is not None
        if dist.get_world_size() == 1:
            return wanted
        if step % ASK_EVERY:
            return False
        asked = torch.tensor([int(wanted)])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > self._echo_seconds:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
