"""What it costs to gather for ``route_by: auto``: steps that a probe listens to / plain ones.

    python -m benchmarks.bench_gathering --backbone din --out benchmarks/results/gathering.jsonl

Two models of the same seed train on the same batches in turn, a window of steps at a time, one
with a probe that listens as a run does. They must end with the same bits. Times are processor time
of the process, which other programs of the machine change less than the clock.
"""

import argparse
import statistics
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks.driving import assembled, check_same_state, Driven
from benchmarks.harness import append, environment
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.auto_routing import AutoRouting, decided_model, window_of
from torchrec_hilomoe.training.inputs import loader_of, schema_of, timeline_of
from torchrec_hilomoe.training.stages import Stage

PLAIN = Stage(name="backbone_warmup", active_layers=0)


def main() -> None:
    """Measure one model and append a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="din")
    parser.add_argument("--head", default="[64,32]")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60, help="of a window")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="append a JSON line to this file")
    asked = parser.parse_args()
    config = parse_run(
        [
            f"--model.backbone={asked.backbone}",
            f"--model.head={asked.head}",
            f"--train.batch_size={asked.batch_size}",
            f"--train.max_steps={2 * asked.steps}",
            "--train.backbone_share=0.5",
            "--train.device=cpu",
            "--model.hilomoe.routing=sample",
            "--model.hilomoe.route_by=auto",
            "--data.train_rows=8388608",
        ]
    ).config
    torch.set_num_threads(1)
    with init_distributed("cpu") as context:
        schema = schema_of(config)
        plain = replace(config, model=decided_model(config.model, None))
        batches = list(islice(loader_of(plain, "train", context.world), asked.steps))
        runs = [assembled(plain, schema, context) for _ in range(2)]
        driven = [Driven(it, iter(batches * (asked.windows + 1)), stage=PLAIN) for it in runs]
        wide = replace(config, train=replace(config.train, max_steps=2 * asked.steps))
        wide = replace(
            wide,
            model=replace(wide.model, hilomoe=replace(wide.model.hilomoe, probe_steps=asked.steps)),
        )
        window = window_of(wide, timeline_of(wide, asked.steps * 2), asked.steps * 2)
        seconds: list[list[float]] = [[], []]
        for number in range(asked.windows + 1):  # the first warms up
            task = driven[1].model.module
            assert isinstance(task, TrainTask)
            auto = AutoRouting(task, wide, window)
            for which, run in enumerate(driven):
                started = time.process_time()
                for step in range(asked.steps):
                    if which:
                        with auto.listening(window.start + step):
                            run.step()
                    else:
                        run.step()
                if number:
                    seconds[which].append(time.process_time() - started)
        check_same_state(*runs, bitwise=True)
    ratios = [heard / alone for alone, heard in zip(*seconds, strict=True)]
    row = {
        "what": "gathering",
        "backbone": asked.backbone,
        "head": asked.head,
        "batch_size": asked.batch_size,
        "steps": asked.steps,
        "every": window.every,
        "step_ms": statistics.median(seconds[0]) / asked.steps * 1e3,
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    print(row)
    append(asked.out, [{**row, **environment("cpu")}])


if __name__ == "__main__":
    main()
