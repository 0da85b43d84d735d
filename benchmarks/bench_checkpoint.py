"""What a checkpoint costs: how long training waits, and how fast it is written.

    python -m benchmarks.bench_checkpoint --out benchmarks/results/checkpoint.jsonl

The step is that of a small model whose table has the size given. Beside our writes stands the
disk's own speed: the same bytes, written to one file and synced. What was saved is loaded back and
compared before anything is reported.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn, Tensor

from benchmarks.harness import append, environment
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress, Saved, Saver

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A table of ``rows`` rows and 64 columns, and a step of ``batch`` rows."""

    rows: int
    batch: int


CASES = [Case(rows=40_000, batch=4096), Case(rows=400_000, batch=4096)]


class Trained:
    """Tensors that a step changes."""

    def __init__(self, case: Case) -> None:
        self.table = torch.randn(case.rows, 64)
        self.dense = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self._batch = case.batch
        self._optimizer = torch.optim.Adam(self.dense.parameters())

    def step(self) -> None:
        """Look rows up, compute, learn."""
        ids = torch.randint(len(self.table), (self._batch,))
        self.dense(self.table[ids]).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.table[ids] += 1e-3

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As it is saved."""
        return {"model": {"table": self.table, **self.dense.state_dict()}}


def timed(act: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def write_plainly(path: Path, content: bytes) -> None:
    """Write and sync one file: what the disk can do."""
    with path.open("wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())


def progress(step: int) -> Progress:
    """Where such a run stands."""
    position = LoaderState(epoch=0, lane_rows=0, num_canonical_shards=1)
    return Progress(step=step, stage="all", position=position, total_steps=ROUNDS)


def run(case: Case, folder: Path) -> dict[str, float]:
    """Measure one case; the contenders take turns."""
    trained, saved = Trained(case), list[Saved]()
    aside = Saver(folder / "aside", keep=1, asynchronous=True, on_saved=saved.append)
    at_once = Saver(folder / "at_once", keep=1)
    aside.save(trained.state(), progress(0))  # takes the memory for copies
    aside.wait()
    check(trained, folder / "aside" / "step_0")
    content = os.urandom(saved[0].bytes)
    times: dict[str, list[float]] = {name: [] for name in ("step", "beside", "sync", "disk")}
    saved.clear()
    for number in range(1, ROUNDS + 1):
        times["step"].append(statistics.median(timed(trained.step) for _ in range(10)))
        aside.save(trained.state(), progress(number))
        times["beside"].append(statistics.median(timed(trained.step) for _ in range(10)))
        aside.wait()
        times["sync"].append(timed(lambda: at_once.save(trained.state(), progress(number))))  # noqa: B023  # called at once
        times["disk"].append(timed(lambda: write_plainly(folder / "plain", content)))
    ratios = zip(times["sync"], times["disk"], strict=True)
    return {
        "megabytes": saved[0].bytes / 1e6,
        "step_ms": 1e3 * statistics.median(times["step"]),
        "stall_ms": 1e3 * statistics.median(it.stall_seconds for it in saved),
        "stall_over_step": statistics.median(
            it.stall_seconds / step for it, step in zip(saved, times["step"], strict=True)
        ),
        "step_while_saving_over_step": statistics.median(
            beside / step for beside, step in zip(times["beside"], times["step"], strict=True)
        ),
        "save_seconds": statistics.median(times["sync"]),
        "save_over_disk": statistics.median(save / disk for save, disk in ratios),
    }


def check(trained: Trained, path: Path) -> None:
    """Refuse to report a checkpoint that is not what was trained."""
    copy = {"model": {name: torch.zeros_like(t) for name, t in trained.state()["model"].items()}}
    checkpoint.open(path).load(copy)
    for name, tensor in trained.state()["model"].items():
        assert torch.equal(copy["model"][name], tensor), name


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: /tmp's")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    with init_distributed("cpu"):
        for case in CASES:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                row = {"rows": case.rows, "batch": case.batch, **run(case, Path(folder))}
            print({name: round(value, 3) for name, value in row.items()})
            append(args.out, [{**row, **environment("cpu")}])


if __name__ == "__main__":
    main()
