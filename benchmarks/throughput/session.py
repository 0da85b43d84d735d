"""One case: check it, time it, take it apart, and return its line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.driving import assembled, Driven
from benchmarks.harness import environment
from benchmarks.throughput.cases import Base, Case
from benchmarks.throughput.checks import check_case
from benchmarks.throughput.clocks import PhaseClock
from benchmarks.throughput.device import (
    fresh_peak,
    memory_of,
    peak_flops,
    sum_over_ranks,
    training_flops,
)
from benchmarks.throughput.feeds import loaded, READY, ready
from benchmarks.throughput.phases import time_phases, timed_step
from benchmarks.throughput.timing import time_steps
from benchmarks.throughput.traffic import sent_bytes
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.inputs import pipelining_of

__all__ = ["Effort", "measure_case", "say"]

# While it is timed a model stays where it began. Else it would learn the few batches that lie ready
# by heart, and its gradients become denormal numbers, with which a CPU takes twice as long.
STILL = 1e-8


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a case is measured.

    Attributes:
        seconds: For the throughput figure.
        phase_steps: Whose phases are timed.
        matrix: Width of the products that find the device's peak.
        scratch: Where files for the loader are written; None is this host's folder for them.
    """

    seconds: float
    phase_steps: int
    matrix: int
    scratch: Path | None


def measure_case(
    base: Base, case: Case, context: DistributedContext, effort: Effort
) -> dict[str, Any]:
    """Return the line of a case; a collective call, of which the first rank's line counts.

    Raises:
        AssertionError: If the loop would train something else than it should.
    """
    config, schema, stream = base.config_of(case), base.schema_of(case), base.stream_of(case)
    check_case(config, stream, context)
    fresh_peak(context.device)
    rates = {"learning_rate": STILL, "table_learning_rate": STILL}
    assembly = assembled(replace(config, train=replace(config.train, **rates)), schema, context)
    with _feed(base, case, context, effort) as batches:
        first = list(islice(batches, READY))
        batches = chain(first, batches)
        driven = Driven(assembly, batches, options=pipelining_of(config, schema))
        timing = time_steps(
            lambda: len(driven.step().labels),
            cycle=READY,
            seconds=effort.seconds,
            device=context.device,
        )
        driven.detach()
        optimizer = assembly.optimizers.stage_optimizer
        # What the pipeline had read ahead is not trained; the rest goes on from there.
        phases = time_phases(driven.model, optimizer, batches, effort.phase_steps)

        def step() -> None:
            timed_step(driven.model, optimizer, batches, PhaseClock(context.device))

        sent = sent_bytes(step)
        memory = memory_of(assembly, step, context)
    lengths = [length for batch in first for length in _lengths(batch, schema)]
    flops = training_flops(config, schema, lengths)
    peak = peak_flops(context.device, case.precision, width=effort.matrix)
    events = sum_over_ranks(sum(lengths)) / sum_over_ranks(len(lengths))
    return {
        "bench": "train_throughput",
        **asdict(case),
        "world_size": context.world.size,
        **asdict(timing),
        "phase_ms": phases,
        "unpipelined_ms": sum(phases.values()),
        "sent_bytes": sum(sent.values()),
        "sent_bytes_by": sent,
        **asdict(memory),
        "events_per_row": events,
        "flops_per_sample": flops,
        "model_flops_per_second": flops * timing.samples_per_second,
        "peak_flops_per_second": peak,
        "flops_share": flops * timing.samples_per_second / peak,
        **environment(context.device.type),
    }


def say(line: dict[str, Any]) -> str:
    """Return a line for people."""
    step = line["step_ms"]
    phases = " ".join(f"{name} {took:.1f}" for name, took in line["phase_ms"].items())
    experts = f"L={line['layers']} E={line['experts']}" if line["layers"] else "plain"
    return (
        f"{line['backbone']} {experts}, {line['pipeline']}, {line['feed']}, "
        f"{line['world_size']} ranks, batch {line['batch_size']}, length {line['length']}, "
        f"{line['rows']:,} rows: {line['samples_per_second']:,.0f} samples/s "
        f"(spread {line['spread']:.0%}{'' if line['conclusive'] else ', too wide to conclude'}), "
        f"step {step['p10']:.1f} {step['p50']:.1f} {step['p90']:.1f} {step['p99']:.1f} ms "
        f"(10, 50, 90, 99 %)\n    in order, ms: {phases}\n"
        f"    sent {line['sent_bytes'] / 1e6:.2f} MB a step, peak {line['peak_bytes'] / 2**20:.0f} "
        f"MiB a rank, {line['model_flops_per_second'] / 1e9:.1f} GFLOP/s "
        f"({line['flops_share']:.1%} of the device's)"
    )


@contextmanager
def _feed(
    base: Base, case: Case, context: DistributedContext, effort: Effort
) -> Iterator[Iterator[CTRBatch]]:
    stream = base.stream_of(case)
    if case.feed == "ready":
        yield ready(stream, case.batch_size, context)
        return
    with loaded(base.config_of(case), stream, context, effort.scratch) as batches:
        yield batches


def _lengths(batch: CTRBatch, schema: Schema) -> list[int]:
    """The events of each row's longest history."""
    keys = [group.fields[0].name for group in schema.sequences]
    if not keys:
        return [1] * len(batch.labels)
    lengths = torch.stack([batch.unpooled[key].lengths() for key in keys])
    return lengths.amax(dim=0).tolist()
