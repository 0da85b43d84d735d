"""Samples a second and what a step takes, from steps in rounds of equal work."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed as dist

from benchmarks.harness import FEWEST_ROUNDS, relative_iqr, settle_heap, TOO_WIDE
from benchmarks.throughput.clocks import clock_of

__all__ = ["PERCENTILES", "Timing", "agreed", "time_steps"]

PERCENTILES = (10, 50, 90, 99)
USUAL_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was timed.

    Attributes:
        samples_per_second: Of all ranks; the median over rounds.
        spread: Interquartile range over rounds, as a share of that median.
        conclusive: Whether it is small enough to conclude from.
        rounds: How many.
        steps: In all of them.
        step_ms: Percentiles of a step's time, by ``p10``, ``p50``, ``p90`` and ``p99``.
    """

    samples_per_second: float
    spread: float
    conclusive: bool
    rounds: int
    steps: int
    step_ms: dict[str, float]


def time_steps(
    step: Callable[[], int],
    *,
    cycle: int,
    seconds: float,
    device: torch.device,
) -> Timing:
    """Time steps for about ``seconds``, at least five rounds; a collective call.

    Nothing waits for the device between two steps, so what a pipeline overlaps stays overlapped.

    Args:
        step: Trains one, and returns how many rows this rank had.
        cycle: Steps after which the batches are the same again: a round is a multiple of it.
        seconds: What is asked for; the first rank's clock decides.
        device: Where this rank computes.
    """
    settle_heap()
    took = min(_seconds_of(step, cycle, device) for _ in range(2))  # the first warms up
    wanted = max(1, math.ceil(seconds / USUAL_ROUNDS / max(took, 1e-9)))
    per_round = cycle * int(_first_rank_says(wanted))
    clock, rows, rounds = clock_of(device), [], 0
    dist.barrier()
    clock.tick()
    begin = time.perf_counter()
    while agreed(rounds < FEWEST_ROUNDS or time.perf_counter() - begin < seconds):
        for _ in range(per_round):
            rows.append(step())
            clock.tick()
        # Not to run ahead of the device without end, yet never to let it run dry.
        clock.catch_up(rounds * per_round)
        rounds += 1
    took_ms = np.array(clock.milliseconds())
    rows_of_all = torch.tensor(rows, dtype=torch.float64)
    dist.all_reduce(rows_of_all)
    of_rounds = rows_of_all.numpy().reshape(rounds, per_round).sum(axis=1)
    speeds = of_rounds / took_ms.reshape(rounds, per_round).sum(axis=1) * 1e3
    spread = relative_iqr(speeds.tolist())
    return Timing(
        samples_per_second=float(np.median(speeds)),
        spread=spread,
        conclusive=spread <= TOO_WIDE,
        rounds=rounds,
        steps=len(rows),
        step_ms={f"p{at}": float(np.percentile(took_ms, at)) for at in PERCENTILES},
    )


def agreed(wish: bool) -> bool:
    """Return the first rank's wish, on every rank."""
    return bool(_first_rank_says(float(wish)))


def _first_rank_says(value: float) -> float:
    if dist.get_world_size() == 1:
        return value
    said = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(said, src=0)
    return said.item()


def _seconds_of(step: Callable[[], int], times: int, device: torch.device) -> float:
    clock = clock_of(device)
    clock.tick()
    for _ in range(times):
        step()
        clock.tick()
    return sum(clock.milliseconds()) / 1e3
