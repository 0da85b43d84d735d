"""Runs in which something goes wrong on purpose, and what their ends are compared by."""

import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.helpers.processes import RankFailed, ROOT, run_ranks
from tests.helpers.runs import Ended, read_lines, read_tensors, run_app_here
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.log.reading import METRICS_FILE, ROUTING_FILE

__all__ = ["FAST", "Kill", "assert_same_run", "fail_with", "run_with"]

KILLER = "killer"
# Stages end after steps 2, 4 and 8; dropout draws random numbers; every step is saved.
FAST = (
    "--train.max_steps=8",
    "--train.batch_size=32",
    "--train.stages=[{name: backbone, steps: 2, active_layers: 0}, {name: experts, steps: 2, "
    "train_backbone: false, train_tables: false}, {name: finetune}]",
    "--train.log_every=3",
    "--data.train_rows=512",
    "--data.eval_rows=64",
    "--model.hilomoe.num_layers=1",
    "--model.hilomoe.routing=row",
    "--model.hilomoe.route_by=null",
    "--model.dropout=0.1",
    "--model.batch_norm=true",
    "--checkpoint.every_steps=1",
    "--checkpoint.keep=20",
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Kills ranks at a random moment that a seed decides.

    Attributes:
        seed: Of everything random here.
        folder: Of the run's checkpoints.
        ranks: How many there are.
    """

    seed: int
    folder: Path
    ranks: int

    def __call__(self) -> None:
        """Decide, on every rank alike, and wait in a thread for the moment."""
        dice = random.Random(self.seed)
        step = dice.randrange(1, 9)
        # While a checkpoint is written, or at any moment after it.
        inside = dice.random() < 0.6
        seen = self.folder / (f".step_{step}.partial" if inside else f"step_{step}")
        delay = dice.random() * (0.02 if inside else 0.3)
        victims = dice.choice([range(self.ranks), [dice.randrange(self.ranks)]])

        def wait_and_kill() -> None:
            done = self.folder / f"step_{step}"
            while not (seen.exists() or done.exists()):
                time.sleep(0.0005)
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)

        if int(os.environ["RANK"]) in victims:
            threading.Thread(target=wait_and_kill, daemon=True, name=KILLER).start()


def run_with(
    fault: Callable[[], None] | None, argv: Sequence[str], *, ranks: int, timeout: float = 120
) -> list[Ended]:
    """Run ``apps/train.py`` on so many ranks, each of which calls ``fault`` before it starts."""
    return run_ranks(_run_with, ranks, fault, [*FAST, *argv], joined=False, timeout=timeout)


def fail_with(fault: Callable[[], None], argv: Sequence[str], *, ranks: int) -> str:
    """Run the same to the end of all ranks, one of which must fail; return what they showed."""
    try:
        run_ranks(_fail_with, ranks, fault, [*FAST, *argv], joined=False)
    except RankFailed as failure:
        return str(failure)
    raise AssertionError("no rank failed")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two runs ended with the same bits, and wrote the same lines of metrics."""
    ends = [checkpoint.latest(run / "checkpoints") for run in (ours, theirs)]
    assert None not in ends
    progress = [checkpoint.open(str(end)).progress for end in ends]
    assert progress[0] == progress[1]
    tensors = [read_tensors(Path(str(end))) for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    assert [n for n in tensors[0] if not torch.equal(tensors[0][n], tensors[1][n])] == []
    for name in (METRICS_FILE, ROUTING_FILE):
        assert read_lines(ours / name) == read_lines(theirs / name)


def _run_with(fault: Callable[[], None] | None, argv: list[str]) -> Ended:
    if fault is not None:
        fault()
    ended = run_app_here(argv)
    for thread in threading.enumerate():
        if thread.name == KILLER:  # its moment may be after the end
            thread.join()
    return ended


def _fail_with(fault: Callable[[], None], argv: list[str]) -> None:
    """As above, but what the app shows goes where a killed process leaves it, too."""
    fault()
    sys.argv = ["apps/train.py", *argv]
    runpy.run_path(str(ROOT / "apps" / "train.py"), run_name="__main__")
