"""What a training step costs beside the model: the loop's own share, and stage 1's price.

    python -m benchmarks.bench_train_step --out benchmarks/results/train_step.jsonl

``overhead``: a step of the real trainer (loader, pipeline, metrics' window, watch, log) and a bare
one (forward with lookup, backward, optimizers, on a batch that lies ready) take turns on two equal
models. The share is what the trainer's step takes beyond the bare one; that of the loader and that
of everything else are told apart by giving the trainer batches that lie ready, too. Both begin from
the same tensors, and must end with the same: a loop that trains something else is not timed.

``stages``: bare steps of the plain model, and of one with experts in stage 1 (none computes), in a
frozen stage and in the last one, take turns. Stage 1 must give the plain model's losses to the bit.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.driving import ALL, assembled, BY_ROW, check_same_state, copy_state
from benchmarks.harness import append, environment, measure
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config import InjectionConfig, RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.runtime.distributed import DistributedContext, init_distributed
from torchrec_hilomoe.training.assemble import Assembly
from torchrec_hilomoe.training.checkpoint import Saver
from torchrec_hilomoe.training.inputs import loader_of, schema_of
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.pipelines.pipeline import PipelineOptions, Unpipelined
from torchrec_hilomoe.training.stages import Stage, StageSchedule, StageSpan, StageTimeline
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import Intervals, Trainer

STAGE_1 = Stage(name="stage 1", active_layers=0)
FROZEN = Stage(name="experts alone", train_backbone=False, train_tables=False)
WARM = 5  # steps that are trained and not timed
READY = 64  # batches that lie ready: more than fit into a cache


class Bare:
    """Forward, backward, optimizers, and nothing else."""

    def __init__(self, assembly: Assembly, stage: Stage, batches: Iterator[CTRBatch]) -> None:
        self.assembly = replace(assembly, model=enter_stage(assembly.model, stage))
        assembly.optimizers.enter(stage)
        self._span = StageSpan(stage=stage, start=0, stop=1)
        self._batches = batches
        self._step = Unpipelined(
            self.assembly.model, assembly.optimizers.stage_optimizer, self.assembly.model.device
        )

    def fetch(self) -> CTRBatch:
        """Return the next batch, however long that takes."""
        return next(self._batches)

    def step(self, batch: CTRBatch | None = None) -> Tensor:
        """Train one step, on the next batch if none is given, and return its loss."""
        self.assembly.optimizers.set_rates(self._span, 0, decay=1.0)
        return self._step.progress(self._batches if batch is None else iter([batch])).loss


class Turns(RunLog):
    """A log that is told of every step of the trainer, and then lets a bare one have its turn."""

    def __init__(self, folder: Path, steps: int, bare: Bare) -> None:
        super().__init__(folder, steps, 0, enabled=False)
        self.run_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._bare = bare
        self._last = time.perf_counter()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Note the trainer's time since the last turn, and take one."""
        super().step(*args, **kwargs)
        self.run_seconds.append(time.perf_counter() - self._last)
        batch = self._bare.fetch()
        begin = time.perf_counter()
        self._bare.step(batch)
        self._last = time.perf_counter()
        self.bare_seconds.append(self._last - begin)


class Ready(Loader):
    """The loader's batches, made before the clock runs."""

    def __init__(self, batches: list[CTRBatch]) -> None:
        self._ready = batches

    def __iter__(self) -> Generator[CTRBatch, None, None]:
        yield from cycle(self._ready)


def overhead(
    config: RunConfig, context: DistributedContext, steps: int, *, ready: bool, pipeline: str
) -> dict:
    """Time trainer and bare steps in turns, and check that they trained the same."""
    batches = list(islice(iter(loader_of(config, "train", context.world)), READY))
    assembly, twin = _assemble(config, context), _assemble(config, context)
    copy_state(assembly, twin)
    fresh = iter(loader_of(config, "train", context.world))
    bare = Bare(twin, ALL, cycle(batches) if ready else fresh)
    with tempfile.TemporaryDirectory() as folder:
        log = Turns(Path(folder), steps, bare)
        trainer = Trainer(
            assembly.model,
            assembly.optimizers,
            StageTimeline(StageSchedule(stages=(ALL,)), total_steps=steps),
            intervals=Intervals(log_every=50, evaluate_every=None, save_every=None),
            log=log,
            saver=Saver(folder),
            pipelining=PipelineOptions(kind=cast(Any, pipeline), debug=False),
        )
        validation = loader_of(config, "valid", context.world)
        trainer.fit(
            Ready(batches) if ready else loader_of(config, "train", context.world), validation
        )
    # Refuse to report a loop that trained something else than the bare steps.
    check_same_state(replace(assembly, model=trainer.model), bare.assembly, bitwise=True)
    run, alone = log.run_seconds[WARM:], log.bare_seconds[WARM:]
    return {
        "case": "overhead",
        "pipeline": pipeline,
        "loader": not ready,
        "steps": steps,
        "run_ms": statistics.median(run) * 1e3,
        "bare_ms": statistics.median(alone) * 1e3,
        # Of totals: a line of the log is due every 50 steps only, and is part of the price.
        "share": 1 - sum(alone) / sum(run),
        "median_share": statistics.median(1 - b / r for r, b in zip(run, alone, strict=True)),
    }


def stages(config: RunConfig, context: DistributedContext, seconds: float) -> list[dict]:
    """Time steps of the plain model and of the stages in turns."""
    batches = list(islice(iter(loader_of(config, "train", context.world)), READY))
    plain = replace(config, model=replace(config.model, hilomoe=InjectionConfig(enabled=False)))
    built = {"plain": Bare(_assemble(plain, context), ALL, cycle(batches))}
    for stage in (STAGE_1, FROZEN, ALL):
        assembly = _assemble(config, context)
        copy_state(built["plain"].assembly, assembly)
        built[stage.name] = Bare(assembly, stage, cycle(batches))
    for _ in range(3):
        want, got = built["plain"].step(), built[STAGE_1.name].step()
        assert torch.equal(want, got), f"stage 1 trains another model: {got} instead of {want}"
    contenders: dict[str, Callable[[], object]] = {name: it.step for name, it in built.items()}
    return [
        {
            "case": "stages",
            "stage": name,
            "step_ms": found.median_us / 1e3,
            "throughput": 1 / found.ratio,
            "throughput_iqr": found.ratio_iqr / found.ratio**2,
            "conclusive": found.conclusive,
        }
        for name, found in measure(contenders, seconds, context.device.type).items()
    ]


def _assemble(config: RunConfig, context: DistributedContext) -> Assembly:
    return assembled(config, schema_of(config), context)


def main() -> None:
    """Measure every case and append its lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each overhead case")
    parser.add_argument("--seconds", type=float, default=30, help="for the stages together")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args, overrides = parser.parse_known_args()
    for batch_size in args.batch_sizes:
        fixed = ["--train.decay.kind", "constant", "--train.warmup_steps", "0"]
        rows = ["--data.train_rows", str(max(READY * batch_size, 65_536))]
        sizes = ["--train.batch_size", str(batch_size), "--data.eval_rows", "8192"]
        config = parse_run([*BY_ROW, *fixed, *rows, *sizes, *overrides]).config
        with init_distributed(config.train.device) as context:
            stamp = {
                **environment(context.device.type),
                "backbone": config.model.backbone,
                "batch_size": batch_size,
            }
            run = partial(overhead, config, context, args.steps)
            found = [
                run(ready=ready, pipeline=pipeline)
                for ready in (True, False)
                for pipeline in ("base", "sparse_dist")
            ]
            found += stages(config, context, args.seconds)
        for row in found:
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
        append(args.out, [{**row, **stamp} for row in found])


if __name__ == "__main__":
    main()
