"""Times of a GPU's work: calls one behind the other, and the same replayed from a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Times", "graph_of", "time_in_turns"]

ROUND_S = 4e-3  # of one contender in one round, so that a clock's own error is small


@dataclass(frozen=True, kw_only=True)
class Times:
    """One contender's figures.

    Attributes:
        us: Median microseconds of a call.
        ratio: Median over rounds of its time over the first contender's.
        ratio_iqr: Interquartile range of the same.
    """

    us: float
    ratio: float
    ratio_iqr: float


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    calls: int,
    seconds: float,
    device: str,
    fewest: int = 7,
) -> dict[str, Times]:
    """Time contenders in turns, one round each; the first is the baseline.

    Args:
        contenders: What to call, by name; warm.
        calls: How many calls of a layer one call of a contender makes.
        seconds: In all; ``fewest`` rounds are made however long they take.
        device: ``cuda`` or ``cpu``.
        fewest: Rounds.
    """
    repeats = {}
    for name, fn in contenders.items():
        fn()
        repeats[name] = max(1, min(200, round(ROUND_S / max(_seconds(fn, 3, device) / 3, 1e-7))))
    took: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    rounds = 0
    while rounds < fewest or time.perf_counter() - begin < seconds:
        rounds += 1
        for name, fn in contenders.items():
            took[name].append(_seconds(fn, repeats[name], device) / repeats[name] / calls)
    baseline = next(iter(took.values()))
    found = {}
    for name, values in took.items():
        ratios = [mine / base for mine, base in zip(values, baseline, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = Times(
            us=statistics.median(values) * 1e6,
            ratio=statistics.median(ratios),
            ratio_iqr=high - low,
        )
    return found


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call's kernels, to be replayed without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def best_seconds(fns: Sequence[Callable[[], object]], device: str, trials: int = 5) -> float:
    """The least time that a call of any of ``fns`` took."""
    return min(_seconds(fn, 1, device) for fn in fns for _ in range(trials))


def _seconds(fn: Callable[[], object], repeats: int, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            fn()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
