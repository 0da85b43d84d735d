"""Case -> check -> time -> JSON line: what every benchmark shares.

Contenders of a case take turns, one call each a round, so that whatever else the machine does falls
on all of them alike; ratios are taken within a round, and the median over rounds is reported.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Measurement", "append", "environment", "measure", "peak_bytes"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contender's figures.

    Attributes:
        median_us: Median time of a call, in microseconds.
        iqr_us: Interquartile range of the same.
        ratio: Median over rounds of its time over the baseline's.
        ratio_iqr: Interquartile range of the same: above a tenth of the ratio, the machine was too
            busy to conclude from.
    """

    median_us: float
    iqr_us: float
    ratio: float
    ratio_iqr: float


def measure(
    contenders: Mapping[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, Measurement]:
    """Time contenders in turns for about ``seconds`` in all; the first is the baseline."""
    _settle_heap()
    for fn in contenders.values():
        fn()  # warm up: allocate, compile
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while len(times[next(iter(times))]) < 5 or time.perf_counter() - start < seconds:
        for name, fn in contenders.items():
            _wait_for(device)
            begin = time.perf_counter()
            fn()
            _wait_for(device)
            times[name].append(time.perf_counter() - begin)
    baseline = next(iter(times.values()))
    results = {}
    for name, values in times.items():
        ratios = [mine / base for mine, base in zip(values, baseline, strict=True)]
        results[name] = Measurement(
            median_us=statistics.median(values) * 1e6,
            iqr_us=_iqr(values) * 1e6,
            ratio=statistics.median(ratios),
            ratio_iqr=_iqr(ratios),
        )
    return results


def peak_bytes(fn: Callable[[], object], device: str) -> int:
    """The most memory that a call of ``fn`` holds beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        fn()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]  # missing in torch's stub
            peak = max(peak, held)
    return peak


def environment(device: str) -> dict[str, str | int]:
    """What a reader must know before comparing two result files."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "none",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def append(path: Path, rows: list[dict]) -> None:
    """Append JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in rows)


def _settle_heap() -> None:
    """Free one large block, so that the C library stops returning small ones to the system.

    Any process that trains does so sooner or later; before, each fresh block costs page faults.
    """
    block = torch.empty(30 * 2**20, dtype=torch.uint8)
    del block


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _iqr(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux says more than Python does
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
