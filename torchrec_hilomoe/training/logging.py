"""What a person sees of a run, and what is kept: lines, a bar, ``metrics.jsonl``, TensorBoard."""

import json
import logging
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from torchrec_hilomoe.training.checkpoint import Saved
from torchrec_hilomoe.training.metrics import Metrics

__all__ = ["RunLog"]

logger = logging.getLogger(__name__)


class _Scalars(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """Writes and shows metrics; on ranks other than the first, does nothing.

    On a terminal there is one progress bar; elsewhere plain lines.

    Args:
        folder: Of the run.
        total_steps: Length of the run.
        start: Step at which it starts or goes on.
        enabled: Whether this rank writes.
    """

    def __init__(self, folder: Path, total_steps: int, start: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._folder = folder
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            unit="step",
            disable=not (enabled and sys.stderr.isatty()),
        )
        self._total = total_steps
        self._start = start
        self._scalars = _tensorboard(folder, start) if enabled else None

    def cut_back(self) -> None:
        """Drop lines of steps that are to be trained again, and of a test that is.

        A run that was killed wrote them after its last checkpoint. A line that was cut short by
        the kill goes too.
        """
        file = self._folder / "metrics.jsonl"
        if not (self._enabled and file.exists()):
            return
        lines = file.read_text().splitlines()
        kept = [line for line in lines if _is_before(line, self._start)]
        if kept != lines:
            partial = file.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, file)

    def step(self, stage: str) -> None:
        """Count one optimizer step."""
        self._bar.set_description(stage, refresh=False)
        self._bar.update()

    def record(
        self, *, step: int, stage: str, split: str, metrics: Metrics, **more: float | None
    ) -> None:
        """Write one line of ``metrics.jsonl``, and show it.

        Args:
            step: Optimizer steps done.
            stage: Name of the stage.
            split: ``train``, ``valid`` or ``test``.
            metrics: Over all ranks.
            more: Further numbers under their names.
        """
        if not self._enabled:
            return
        values = {name: _finite(value) for name, value in {**asdict(metrics), **more}.items()}
        row = {"step": step, "stage": stage, "split": split, **values}
        with (self._folder / "metrics.jsonl").open("a") as sink:
            sink.write(json.dumps(row) + "\n")
        if self._scalars is not None:
            for name, value in values.items():
                if value is not None:
                    self._scalars.add_scalar(f"{split}/{name}", value, step)
        shown = " ".join(
            f"{name} {values[name]:.4f}"
            for name in ("auc", "gauc", "logloss", "ne")
            if values[name] is not None
        )
        speed = values.get("samples_per_second")
        speed_shown = f" {speed:,.0f} samples/s" if speed else ""
        self.say(f"step {step}/{self._total} {stage} {split}: {shown}{speed_shown}")

    def saved(self, found: Saved) -> None:
        """Tell of a checkpoint."""
        self.say(
            f"saved {found.path}: {found.bytes / 1e6:,.1f} MB in {found.write_seconds:.2f} s; "
            f"training waited for {found.stall_seconds:.2f} s"
        )

    def say(self, text: str) -> None:
        """Show one line, above the bar if there is one."""
        if self._enabled:
            self._bar.clear()
            logger.info("%s", text)
            self._bar.refresh()

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        if self._scalars is not None:
            self._scalars.close()


def _is_before(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["step"] <= step and row["split"] != "test"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Path, start: int) -> _Scalars | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so %s is not written; "
            "pip install 'torchrec-hilomoe[tensorboard]'",
            folder / "tensorboard",
        )
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start)
