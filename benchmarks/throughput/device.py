"""What the device can do, what a rank's memory holds, and how many FLOPs a sample costs."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import Tensor

from benchmarks.driving import local_parts
from benchmarks.harness import peak_bytes, wait_for
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.flops import count_cost
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import Assembly
from torchrec_hilomoe.training.trainer import training_state

__all__ = ["Memory", "fresh_peak", "memory_of", "peak_flops", "sum_over_ranks", "training_flops"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
HIGH_WATER = "VmHWM"
TRIALS = 5


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the rank that needs most of each.

    Attributes:
        state_bytes: Tables, parameters and optimizer state.
        peak_bytes: The most at once: on a GPU, what was allocated since the case began; on a CPU,
            the state and what a step allocates beyond it.
        process_bytes: The most that the process held since the case began, with its libraries and
            what earlier cases left behind; None where the system does not say.
    """

    state_bytes: int
    peak_bytes: int
    process_bytes: int | None


def peak_flops(device: torch.device, precision: str, *, width: int) -> float:
    """Return the FLOP/s of all ranks in large products of the dense part's type.

    All ranks multiply at once, because they may share a device's power or a CPU's cores.

    Args:
        device: Where this rank computes.
        precision: Of the dense part.
        width: Of the square matrices.
    """
    one, other = (torch.randn(width, width).to(device, DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(TRIALS):
        dist.barrier()
        wait_for(device.type)
        begin = time.perf_counter()
        torch.mm(one, other)
        wait_for(device.type)
        best = min(best, time.perf_counter() - begin)
    return sum_over_ranks(2 * width**3 / best)


def training_flops(config: RunConfig, schema: Schema, lengths: Sequence[int]) -> int:
    """Return the FLOPs of training one sample: forward and backward, of the mean sample.

    Padding is no work. The model's cost, which is counted for full histories, is counted at five
    quantiles of the lengths that there are, because it need not grow evenly with them.
    """
    counted: dict[int, int] = {}
    at = [max(1, round(length)) for length in np.quantile(lengths, QUANTILES)]
    for length in set(at):
        cut = replace(
            schema,
            sequences=tuple(
                replace(group, max_length=min(group.max_length, length))
                for group in schema.sequences
            ),
        )
        task = build_task(config.model, cut)
        cost = count_cost(task, cut, config.model.embedding_dim)
        counted[length] = cost.training_flops["total"]
    return round(sum(counted[length] for length in at) / len(at))


def fresh_peak(device: torch.device) -> None:
    """Forget the peak of what was before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    reset = Path("/proc/self/clear_refs")  # Linux: 5 resets the high-water mark
    if reset.exists():
        reset.write_text("5")


def memory_of(
    assembly: Assembly, step: Callable[[], object], context: DistributedContext
) -> Memory:
    """Return what was needed since :func:`fresh_peak`; a collective call.

    Args:
        assembly: The model.
        step: Trains one step, without a pipeline.
        context: Its ranks.
    """
    state = state_bytes(assembly)
    process = _high_water()
    if context.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(context.device)
        step()
    else:
        peak = state + peak_bytes(step, "cpu")
    most = torch.tensor([state, peak, process or 0])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    state, peak, high = most.tolist()
    return Memory(
        state_bytes=state, peak_bytes=peak, process_bytes=None if process is None else high
    )


def state_bytes(assembly: Assembly) -> int:
    """Return the bytes of everything that training changes, on this rank, each storage once."""
    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                add(inner)
            return
        for part in local_parts(value):
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                storages[storage._cdata] = storage.nbytes()

    add(dict(training_state(assembly.model, assembly.optimizers)))
    return sum(storages.values())


def sum_over_ranks(value: float) -> float:
    """Return the sum; a collective call."""
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _high_water() -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(HIGH_WATER)]
    return int(found[0]) * 1024 if found else None
