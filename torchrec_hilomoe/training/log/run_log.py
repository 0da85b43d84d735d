"""What a person sees of a run, and what is kept: lines, a bar, ``metrics.jsonl``, TensorBoard."""

import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from torchrec_hilomoe.training.checkpoint import Saved
from torchrec_hilomoe.training.log.curves import Curves, finite
from torchrec_hilomoe.training.log.routing import LayerLoad
from torchrec_hilomoe.training.metrics import Metrics

__all__ = ["METRICS_FILE", "ROUTING_FILE", "RunLog"]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ROUTING_FILE = "routing.jsonl"
SHOWN = ("auc", "gauc", "logloss", "ne", "calibration")


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
            dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )
        self._total = total_steps
        self._start = start
        self._curves = Curves(folder / "tensorboard", start + 1) if enabled else None

    def cut_back(self) -> None:
        """Drop lines of steps that are to be trained again, and of a test that is.

        A run that was killed wrote them after its last checkpoint. A line that was cut short by
        the kill goes too.
        """
        for name in (METRICS_FILE, ROUTING_FILE) if self._enabled else ():
            file = self._folder / name
            if not file.exists():
                continue
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

    def enter(self, stage: str, step: int, until: int) -> None:
        """Tell of a stage."""
        if self._curves is not None:
            self._curves.text("stage", stage, step)
        self.say(f"stage {stage}: steps {step + 1} to {until}")

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
        if self._curves is None:
            return
        values = {name: finite(value) for name, value in {**asdict(metrics), **more}.items()}
        self._append(METRICS_FILE, [{"step": step, "stage": stage, "split": split, **values}])
        self._curves.numbers(split, values, step)
        shown = " ".join(f"{name} {values[name]:.4f}" for name in SHOWN if values[name] is not None)
        speed = values.get("samples_per_second")
        speed_shown = f"{speed:,.0f} samples/s" if speed else ""
        if split == "train":
            loss, auc = (f"{metrics.logloss:.4f}", f"{metrics.auc:.4f}")
            self._bar.set_postfix_str(f"loss {loss}, auc {auc}, {speed_shown}", refresh=False)
        self.say(f"step {step}/{self._total} {stage} {split}: {shown} {speed_shown}".rstrip())

    def routing(self, step: int, stage: str, loads: Iterable[LayerLoad]) -> None:
        """Write where the routers sent their rows, a line of ``routing.jsonl`` a layer."""
        if self._curves is None:
            return
        found = list(loads)
        where = {"step": step, "stage": stage, "split": "train"}
        self._append(ROUTING_FILE, [{**where, **asdict(load)} for load in found])
        for load in found:
            self._curves.load(load, step)

    def saved(self, found: Saved) -> None:
        """Tell of a checkpoint."""
        if self._curves is not None:
            self._curves.numbers(
                "checkpoint",
                {
                    "stall_seconds": found.stall_seconds,
                    "write_seconds": found.write_seconds,
                    "megabytes": found.bytes / 1e6,
                },
                found.step,
            )
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
        if self._curves is not None:
            self._curves.close()

    def _append(self, name: str, rows: list[dict]) -> None:
        with (self._folder / name).open("a") as sink:
            sink.writelines(json.dumps(row) + "\n" for row in rows)


def _is_before(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["step"] <= step and row["split"] != "test"
