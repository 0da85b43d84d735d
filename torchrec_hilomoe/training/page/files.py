"""What a run's folder holds, read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_hilomoe.training.log.run_log import METRICS_FILE, ROUTING_FILE

__all__ = ["Band", "RunFiles", "read_run"]

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Band:
    """A stage as the log saw it: from after ``start`` to ``stop``."""

    stage: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run.

    Attributes:
        folder: Where it lies.
        metrics: Lines of metrics, in order.
        routing: Lines of routing, in order.
        summary: Its end; empty while it runs.
        config: Its configuration, as YAML.
        plan: Where its tables are, as text.
    """

    folder: Path
    metrics: Sequence[Row]
    routing: Sequence[Row]
    summary: Row
    config: str
    plan: str

    def of(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it has one."""
        found = [
            (row["step"], row[name])
            for row in self.metrics
            if row["split"] == split and row.get(name) is not None
        ]
        return [step for step, _ in found], [value for _, value in found]

    def bands(self) -> list[Band]:
        """The stages; a line of training ends where its stage does, at the latest."""
        bands: list[Band] = []
        for row in self.metrics:
            if row["split"] != "train":
                continue
            start = bands[-1].stop if bands else 0
            if bands and bands[-1].stage == row["stage"]:
                start = bands.pop().start
            bands.append(Band(stage=row["stage"], start=start, stop=row["step"]))
        return bands


def read_run(folder: Path) -> RunFiles:
    """Read a run.

    Raises:
        ValueError: If there is none.
    """
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(
            f"there is no run in {folder}: {METRICS_FILE} is missing. Give the --out_dir of a run "
            "that has trained for at least train.log_every steps."
        )
    summary = _text(folder / "summary.json")
    return RunFiles(
        folder=folder,
        metrics=_lines(folder / METRICS_FILE),
        routing=_lines(folder / ROUTING_FILE),
        summary=json.loads(summary) if summary else {},
        config=_text(folder / "config.yaml"),
        plan=_text(folder / "plan.txt"),
    )


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _lines(file: Path) -> list[Row]:
    """Whole lines: a run that is still writing may have begun another."""
    return [json.loads(line) for line in _text(file).splitlines(keepends=True) if line[-1] == "\n"]
