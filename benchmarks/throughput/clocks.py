"""When things happened on a device, without waiting for it."""

import time
from abc import ABC, abstractmethod
from typing import final

import torch

__all__ = ["Clock", "PhaseClock", "clock_of"]


class Clock(ABC):
    """Notes moments in the order of a device's work."""

    @abstractmethod
    def tick(self) -> None:
        """Note this moment: when the device has done what it has been told so far."""

    @abstractmethod
    def catch_up(self, tick: int) -> None:
        """Wait until a moment noted before has come."""

    @abstractmethod
    def milliseconds(self) -> list[float]:
        """Return the time between each moment and the next; waits for the last."""


@final
class HostClock(Clock):
    """For a CPU, which has done what it was told when a call returns."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def tick(self) -> None:
        """See the base class."""
        self._moments.append(time.perf_counter())

    def catch_up(self, tick: int) -> None:
        """See the base class."""

    def milliseconds(self) -> list[float]:
        """See the base class."""
        pairs = zip(self._moments, self._moments[1:], strict=False)
        return [1e3 * (later - sooner) for sooner, later in pairs]


@final
class CudaClock(Clock):
    """For a GPU: events on the current stream, read when all is done."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def tick(self) -> None:
        """See the base class."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def catch_up(self, tick: int) -> None:
        """See the base class."""
        self._events[tick].synchronize()

    def milliseconds(self) -> list[float]:
        """See the base class."""
        torch.cuda.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [sooner.elapsed_time(later) for sooner, later in pairs]


def clock_of(device: torch.device) -> Clock:
    """Return a clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


class PhaseClock:
    """The time of each phase of one step.

    Args:
        device: Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self._phases: list[str] = []

    def enter(self, phase: str) -> None:
        """End the phase before, and begin this one."""
        self._clock.tick()
        self._phases.append(phase)

    def milliseconds(self) -> dict[str, float]:
        """Return the time of each phase but the last, which only ends the one before."""
        total = dict.fromkeys(self._phases[:-1], 0.0)
        for phase, took in zip(self._phases, self._clock.milliseconds(), strict=False):
            total[phase] += took
        return total
