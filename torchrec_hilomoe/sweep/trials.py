"""A trial: one run of ``apps/train.py`` with options of its own, judged by its validations."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torchrec_hilomoe.runtime.documents import DocumentError
from torchrec_hilomoe.training.log.reading import read_metrics, read_summary

__all__ = ["RISING", "Outcome", "run_trial"]

RISING = ("auc", "gauc")  # the others are better when they fall


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        value: Best validation; None if it has none.
        stopped: Whether it was asked to stop, and can go on.
        error: Message with which it failed; None if it did not.
    """

    value: float | None
    stopped: bool = False
    error: str | None = None


def run_trial(options: Sequence[str], folder: Path, *, metric: str, ranks: int) -> Outcome:
    """Run a trial, or go on with it.

    Args:
        options: Of ``apps/train.py``.
        folder: Its own; what is said goes to ``log.txt`` in it.
        metric: What it is judged by.
        ranks: Processes on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    train = ["-m", "torchrec_hilomoe", "train"]
    command = [*launcher, *train, *options, f"--out_dir={folder}", "--resume=auto"]
    log = folder / "log.txt"
    with log.open("a") as sink:
        code = _run(command, sink)
    if code != 0:
        said = log.read_text(errors="replace").splitlines()
        errors = [line for line in said if "rror: " in line]
        return Outcome(value=None, error=(errors or [f"it ended with exit code {code}"])[-1])
    try:
        if not read_summary(folder):
            return Outcome(value=None, stopped=True)
        return Outcome(value=_best_validation(folder, metric))
    except DocumentError as error:
        return Outcome(value=None, error=str(error))


def _run(command: Sequence[str], sink) -> int:
    """Run a command, and pass SIGTERM on to it; Ctrl-C reaches it by itself."""
    with subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, interrupted)


def _best_validation(folder: Path, metric: str) -> float | None:
    rows = read_metrics(folder)
    values = [r[metric] for r in rows if r["split"] == "valid" and r.get(metric) is not None]
    if not values:
        return None
    return max(values) if metric in RISING else min(values)
