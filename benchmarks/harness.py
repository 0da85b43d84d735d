"""Case -> check -> time -> JSON line: what every benchmark shares.

Contenders of a case take turns, one call each a round, so that whatever else the machine does falls
on all of them alike; ratios are taken within a round, and the median over rounds is reported. Where
rounds differ too much to conclude anything, that is said and recorded.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torchrec_hilomoe.runtime.checkout import commit_of

__all__ = [
    "FEWEST_ROUNDS",
    "TOO_WIDE",
    "Measurement",
    "append",
    "environment",
    "measure",
    "peak_bytes",
    "read_lines",
    "relative_iqr",
    "say_too_wide",
    "settle_heap",
    "wait_for",
]

FEWEST_ROUNDS = 5
TOO_WIDE = 0.1  # of a figure: an interquartile range above it is of a machine that did other things


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contender's figures.

    Attributes:
        median_us: Median time of a call, in microseconds.
        iqr_us: Interquartile range of the same.
        p99_us: Time that 99 of 100 calls do not exceed.
        ratio: Median over rounds of its time over the baseline's.
        ratio_iqr: Interquartile range of the same.
        conclusive: Whether that is at most a tenth of the ratio; of the baseline, whose ratio is
            1, whether its time's is at most a tenth of its time.
    """

    median_us: float
    iqr_us: float
    p99_us: float
    ratio: float
    ratio_iqr: float
    conclusive: bool


def measure(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    device: str,
    *,
    agree: Callable[[bool], bool] = bool,
) -> dict[str, Measurement]:
    """Time contenders in turns for about ``seconds`` in all; the first is the baseline.

    Args:
        contenders: What to call, by name.
        seconds: At least five rounds are made, however long they take.
        device: Whose work is waited for.
        agree: Called before each round with whether this process would make it. Several ranks make
            as many rounds if it gives all of them the same answer, once all of them have asked.
    """
    settle_heap()
    for fn in contenders.values():
        fn()  # warm up: allocate, compile
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while agree(rounds < FEWEST_ROUNDS or time.perf_counter() - start < seconds):
        rounds += 1
        for name, fn in contenders.items():
            wait_for(device)
            begin = time.perf_counter()
            fn()
            wait_for(device)
            times[name].append(time.perf_counter() - begin)
    baseline = next(iter(times.values()))
    results = {}
    for name, values in times.items():
        ratios = [mine / base for mine, base in zip(values, baseline, strict=True)]
        spread = relative_iqr(values if values is baseline else ratios)
        if spread > TOO_WIDE:
            say_too_wide(name, spread)
        results[name] = Measurement(
            median_us=statistics.median(values) * 1e6,
            iqr_us=_iqr(values) * 1e6,
            p99_us=sorted(values)[int(0.99 * len(values))] * 1e6,
            ratio=statistics.median(ratios),
            ratio_iqr=_iqr(ratios),
            conclusive=spread <= TOO_WIDE,
        )
    return results


def relative_iqr(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    return _iqr(values) / statistics.median(values)


def say_too_wide(what: str, spread: float) -> None:
    """Tell a person that a figure is not to be concluded from."""
    print(
        f"{what}: spread {spread:.0%} of the figure is too wide to conclude (at most "
        f"{TOO_WIDE:.0%}): this machine is busy; measure again when nothing else runs",
        file=sys.stderr,
    )


def peak_bytes(fn: Callable[[], object], device: str) -> int:
    """The most memory that a call of ``fn`` holds beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library says on stderr when it starts and stops, at a level above its errors'.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        fn()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    held = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # torch's stub lacks their bytes
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment(device: str) -> dict[str, str | int]:
    """What a reader must know before comparing two result files."""
    return {
        "commit": commit_of(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "torchrec": _version("torchrec"),
        "fbgemm": _version("fbgemm-gpu-cpu", "fbgemm-gpu"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def append(path: Path, rows: list[dict]) -> None:
    """Append JSON lines, after removing one that an ended process has left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as sink:
        sink.seek(0)
        written = sink.read()
        sink.truncate(written.rfind(b"\n") + 1)
        sink.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path: Path) -> list[dict]:
    """Return a record's lines, less one that an ended process has left unfinished."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def settle_heap() -> None:
    """Free one large block, so that the C library stops returning small ones to the system.

    Any process that trains does so sooner or later; before, each fresh block costs page faults.
    """
    block = torch.empty(30 * 2**20, dtype=torch.uint8)
    del block


def wait_for(device: str) -> None:
    """Wait until a device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def _iqr(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def _version(*names: str) -> str:
    """Of the first of these packages that is installed; a site alone needs none of them."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux says more than Python does
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
