"""Small whole runs for tests, and what their checkpoints hold."""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.sharded import joined, Part, parts
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext, init_distributed
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.serving.teacher import Teacher
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.inputs import schema_of
from torchrec_hilomoe.training.metrics.predictions import Predictions
from torchrec_hilomoe.training.run import run_training
from torchrec_hilomoe.training.trainer import training_state

__all__ = [
    "SMALL",
    "Ended",
    "assert_same_metrics",
    "load",
    "read_lines",
    "read_tensors",
    "run_app",
    "run_app_here",
    "train",
    "train_and_signal",
    "train_and_signal_in_validation",
    "train_each",
]

# Stages end after steps 5, 7, 9, 12 and 18: the backbone's, one of each expert layer, the rest. So
# short a run would not find by itself what routes experts.
SMALL = (
    "--train.max_steps=18",
    "--train.batch_size=64",
    "--train.backbone_share=0.3",
    "--train.frozen_share=0.34",
    "--train.warmup_steps=4",
    "--train.log_every=4",
    "--data.train_rows=4096",
    "--data.eval_rows=512",
    "--model.dropout=0.1",
    "--model.batch_norm=true",
    "--model.hilomoe.routing=row",
    "--model.hilomoe.route_by=null",
    "--checkpoint.keep=20",
)


@dataclass(frozen=True)
class Ended:
    """How a rank of ``apps/train.py`` ended, and what it had shown."""

    code: int
    shown: str


def run_app(*argv: str, ranks: int = 1) -> list[Ended]:
    """Run ``apps/train.py`` itself, on so many ranks."""
    return run_ranks(run_app_here, ranks, [*SMALL, *argv], joined=False)


def train(out: Path, *overrides: str, ranks: int = 1) -> None:
    """Train a small run to its end in processes of its own, as ``apps/train.py`` does."""
    run_ranks(_train, ranks, [*SMALL, f"--out_dir={out}", *overrides], joined=False)


def train_each(runs: Mapping[Path, Sequence[str]]) -> None:
    """Train small runs, options by folder, one after the other in one process of their own."""
    argvs = [[*SMALL, f"--out_dir={out}", *overrides] for out, overrides in runs.items()]
    run_ranks(_train_each, 1, argvs, joined=False)


def train_and_signal(
    out: Path, *overrides: str, ranks: int, rank: int, number: signal.Signals, step: int
) -> None:
    """Train, and send a signal to one rank as soon as there is a checkpoint of ``step``."""
    argv = [*SMALL, f"--out_dir={out}", *overrides]
    seen = out / "checkpoints" / f"step_{step}"
    run_ranks(_train_and_signal, ranks, argv, rank, number, seen, joined=False)


def train_and_signal_in_validation(
    out: Path, *overrides: str, ranks: int, rank: int, number: signal.Signals
) -> None:
    """Train, and send a signal to one rank after the first batch of the first validation."""
    argv = [*SMALL, f"--out_dir={out}", *overrides]
    run_ranks(_train_and_signal_in_validation, ranks, argv, rank, number, joined=False)


def load(folder: Path, *overrides: str, ranks: int) -> dict[str, Tensor]:
    """Load a checkpoint into the model and optimizers of a job; return what its ranks then hold."""
    return joined(run_ranks(_load, ranks, [*SMALL, *overrides], folder))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What a run logged, but for what the machine did."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        for of_the_machine in ("samples_per_second", "memory_gib"):
            line.pop(of_the_machine, None)
    return lines


def assert_same_metrics(
    got: Mapping[str, float], want: Mapping[str, float], checkpoint: Path
) -> None:
    """Check what two evaluations of a checkpoint found, on other ranks and so in other batches.

    Logits are of float32, of as many terms as the model has weights. Two rows that differ by less
    than that may change places, which is a share of a pair in a row's rank.
    """
    terms = sum(tensor.numel() for tensor in read_tensors(checkpoint).values())
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name.endswith("auc"):
            assert abs(got[name] - value) <= 1 / want["rows"], name
        else:
            assert got[name] == rounded(value, terms, torch.float32), name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by name."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # says it is one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def run_app_here(argv: list[str]) -> Ended:
    """Run ``apps/train.py`` in this process, which is a rank."""
    sys.argv = ["apps/train.py", *argv]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        try:
            runpy.run_path(str(ROOT / "apps" / "train.py"), run_name="__main__")
        except SystemExit as end:
            return Ended(int(end.code or 0), shown.getvalue())
    raise AssertionError("the app did not end with an exit code")


def _train(argv: list[str]) -> None:
    parsed = parse_run(argv)
    with init_distributed("cpu") as context:
        run_training(parsed, context, Teacher)


def _train_each(argvs: list[list[str]]) -> None:
    for argv in argvs:
        _train(argv)


def _train_and_signal(argv: list[str], rank: int, number: signal.Signals, seen: Path) -> None:
    def wait_and_signal() -> None:
        while not seen.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    if os.environ["RANK"] == str(rank):
        threading.Thread(target=wait_and_signal, daemon=True).start()
    _train(argv)


def _train_and_signal_in_validation(argv: list[str], rank: int, number: signal.Signals) -> None:
    add, signalled = Predictions.add, []

    def add_and_signal(self: Predictions, *columns: Tensor) -> None:
        add(self, *columns)
        if not signalled:
            signalled.append(number)
            os.kill(os.getpid(), number)

    asked = os.environ["RANK"] == str(rank)
    with patch.object(Predictions, "add", add_and_signal) if asked else contextlib.nullcontext():
        _train(argv)


def _load(argv: list[str], folder: Path) -> dict[str, list[Part]]:
    config = parse_run(argv).config
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    task = build_task(config.model, schema_of(config))
    assembly = assemble(config, task, DistributedContext(world=world, device=torch.device("cpu")))
    state = training_state(assembly.model, assembly.optimizers)
    checkpoint.open(folder).load(state)
    return parts(state)
