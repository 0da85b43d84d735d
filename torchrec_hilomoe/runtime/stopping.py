"""Stopping between two batches when the scheduler, or a person, asks for it."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import distributed as dist
from torch import Tensor

__all__ = ["StopSignal"]

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopSignal:
    """Notices SIGTERM and Ctrl-C; all ranks agree on when to stop.

    The first signal is kept for :meth:`requested`; a later one acts as it always does. Entering
    and leaving it are collective calls. Several ranks tell each other, in a group of their own,
    while they compute the next step: nobody waits for an answer that is not there yet.

    Args:
        echo_seconds: A signal within so many seconds of the first is the same one: a launcher
            passes on to its ranks what the terminal, or the scheduler, sent to them as well.
    """

    def __init__(self, echo_seconds: float = 2.0) -> None:
        self._echo_seconds = echo_seconds
        self._asked_at: float | None = None
        self._before: dict[signal.Signals, Handler] = {}
        self._group: dist.ProcessGroup | None = None
        self._answer: tuple[Tensor, dist.Work] | None = None  # on its way

    def __enter__(self) -> Self:
        if dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # every rank is one of it
            self._group = group
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
        if kind is None:  # after an error the others may be gone
            self._answered()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def requested(self, *, urgent: bool = False) -> bool:
        """Return whether to stop now, the same on every rank; a collective call.

        Of several ranks, it is whether one of them wanted to at the call before this one.

        Args:
            urgent: Whether this rank has a reason of its own.
        """
        wanted = urgent or self._asked_at is not None
        if self._group is None:
            return wanted
        if self._answered():
            return True
        asked = torch.tensor([int(wanted)])
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._answer = asked, work
        return False

    def _answered(self) -> bool:
        """Wait for the answer that is on its way, and return it."""
        if self._answer is None:
            return False
        (asked, work), self._answer = self._answer, None
        work.wait()
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
