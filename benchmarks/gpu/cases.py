"""A part's cases, one after the other in a process of their own, and the line that each leaves."""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

__all__ = ["Case", "Lines", "Setting", "run_cases"]

LAST_LINES = 12  # of a traceback


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how much.

    Attributes:
        device: ``cuda``, or ``cpu`` in a rehearsal.
        rehearsal: Whether sizes are those of a rehearsal, of seconds.
        scratch: Folder for what is not kept.
        named: Parts of the names of the cases that are wanted; empty wants all.
    """

    device: str
    rehearsal: bool
    scratch: Path
    named: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to check or to measure.

    Attributes:
        name: Unique in its part.
        run: Returns the figures; ``say`` among them is the text for people, ``failed`` what else
            could not be had. Raises on a failure.
        lane: Cases of one lane run one after the other in one process; lanes of a part run
            side by side.
        seconds: After which it counts as hung.
    """

    name: str
    run: Callable[[], Mapping[str, Any]]
    lane: str = "main"
    seconds: float = 60.0


class Lines:
    """The record: JSON lines that several processes append to, each line in one write.

    Args:
        path: The file.
        stamp: What every line has: commit, versions, device.
    """

    def __init__(self, path: Path, stamp: Mapping[str, Any]) -> None:
        self._path, self._stamp = path, dict(stamp)

    def add(self, part: str, case: str, status: str, **figures: Any) -> None:
        """Append a line."""
        line = {"part": part, "case": case, "status": status, **figures, **self._stamp}
        with self._path.open("ab", buffering=0) as sink:
            sink.write(json.dumps(line).encode() + b"\n")


class _Recorded(AbstractContextManager["_Recorded"]):
    """Records what a case raises, whatever it is: one case's failure is no other's."""

    def __init__(self) -> None:
        self.failure: list[str] | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        text = "".join(traceback.format_exception(kind, error, trace))
        self.failure = [line for line in text.splitlines() if line.strip()]
        return True


def run_cases(
    part: str,
    cases: Sequence[Case],
    *,
    lines: Lines,
    attempts: Path,
    deadline: float,
    device: str,
) -> None:
    """Run the cases that were not attempted yet, until the deadline.

    Args:
        part: Their part.
        cases: The most wanted first.
        lines: The record.
        attempts: File with the names of the cases that began, also in a process that died.
        deadline: As of ``time.time()``.
        device: ``cuda`` or ``cpu``.
    """
    done = set(attempts.read_text().splitlines()) if attempts.exists() else set()
    for case in cases:
        if case.name in done:
            continue
        left = deadline - time.time()
        if left <= 0:
            lines.add(part, case.name, "left out", say="no time was left")
            continue
        with attempts.open("a") as sink:
            sink.write(f"{case.name}\n")
        begin = time.perf_counter()
        faulthandler.dump_traceback_later(case.seconds, exit=True, file=sys.stderr)
        with _Recorded() as recorded:
            found = dict(case.run())
        faulthandler.cancel_dump_traceback_later()
        took = {"took_s": round(time.perf_counter() - begin, 2)}
        if recorded.failure is None:
            lines.add(part, case.name, "failed" if found.get("failed") else "ok", **found, **took)
            continue
        shown = [line[:300] for line in recorded.failure]
        lines.add(part, case.name, "failed", say=shown[-1], traceback=shown[-LAST_LINES:], **took)
        if device == "cuda":
            torch.cuda.synchronize()  # raises where the context is lost: the next process goes on


def grouped(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return the cases by lane, in their order."""
    lanes: dict[str, list[Case]] = {}
    for case in cases:
        lanes.setdefault(case.lane, []).append(case)
    return lanes


def few_threads(lanes: int) -> int:
    """Threads of each of so many processes that share this machine's cores."""
    return max(1, min(4, (os.cpu_count() or 1) // max(1, lanes)))
