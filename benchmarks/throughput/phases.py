"""Where a step's time goes: one step after the other, without a pipeline, with notes at each turn.

This is a pass of its own, so that the throughput figure is not disturbed; what a pipeline overlaps
is in order here, and adds up to more than a pipelined step. Waiting for other ranks is part of the
phase that waits: ``backward`` has the averaging of dense gradients, and the exchange of vectors'.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import KeyedOptimizer

from benchmarks.throughput.clocks import PhaseClock
from torchrec_hilomoe.data.batch import CTRBatch

__all__ = ["PHASES", "time_phases", "timed_step"]

# ``data``: the next batch, on the device. ``input_dist``: ids to the ranks of their tables.
# ``lookup``: in the tables. ``output_dist``: vectors back. ``forward``: everything else of the
# forward pass. ``backward``: with the tables' fused update. ``optimizer``: of everything else.
PHASES = ("data", "input_dist", "lookup", "output_dist", "forward", "backward", "optimizer")


def time_phases(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    batches: Iterator[CTRBatch],
    steps: int,
) -> dict[str, float]:
    """Train ``steps`` steps and return the median milliseconds of each phase on this rank.

    Args:
        model: Wrapped for its stage, in no pipeline.
        optimizer: What steps.
        batches: What it trains on.
        steps: One more is trained before, to warm up.
    """
    clocks = []
    for _ in range(steps + 1):
        clocks.append(PhaseClock(model.device))
        timed_step(model, optimizer, batches, clocks[-1])
    found = [clock.milliseconds() for clock in clocks[1:]]
    return {phase: statistics.median(step.get(phase, 0.0) for step in found) for phase in PHASES}


def timed_step(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    batches: Iterator[CTRBatch],
    clock: PhaseClock,
) -> Tensor:
    """Train one step, noting its phases, and return its loss."""
    clock.enter("data")
    batch = next(batches).to(model.device)
    clock.enter("optimizer")
    optimizer.zero_grad()
    clock.enter("forward")
    with _timed_lookups(model, clock):
        loss, output = model(batch)
    clock.enter("backward")
    loss.backward()
    clock.enter("optimizer")
    optimizer.step()
    clock.enter("end")
    return output.loss


@contextmanager
def _timed_lookups(model: DistributedModelParallel, clock: PhaseClock) -> Iterator[None]:
    """Let sharded modules do what their ``forward`` does, one thing after the other."""
    sharded: list[Any] = [m for m in model.modules() if isinstance(m, ShardedModule)]

    def timed(module: Any) -> Any:
        def forward(*inputs: Any) -> Any:
            clock.enter("input_dist")
            context = module.create_context()
            ids = module.input_dist(context, *inputs).wait().wait()
            clock.enter("lookup")
            vectors = module.compute(context, ids)
            clock.enter("output_dist")
            arrived = module.output_dist(context, vectors).wait()
            clock.enter("forward")
            return arrived

        return forward

    for module in sharded:
        module.forward = timed(module)
    try:
        yield
    finally:
        for module in sharded:
            del module.forward
