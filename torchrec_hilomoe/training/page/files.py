"""What a run's folder holds, read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_hilomoe.runtime.documents import (
    DocumentError,
    misfit_of_parts,
    parse_yaml,
    read_text,
)
from torchrec_hilomoe.training.log.reading import (
    METRICS_FILE,
    read_metrics,
    read_probe,
    read_routing,
    read_summary,
)

__all__ = ["Band", "RunFiles", "read_run"]

CONFIG_FILE = "config.yaml"

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
        folder: Folder of the run.
        metrics: Lines of metrics, in order.
        routing: Lines of routing, in order.
        summary: Summary of a finished run; empty while it trains.
        probe: Report of what was found to route its experts; empty where nothing was asked.
        config: Configuration, as YAML.
        options: The same as a mapping; empty if there is none.
        plan: Sharding plan, as text.
    """

    folder: Path
    metrics: Sequence[Row]
    routing: Sequence[Row]
    summary: Row
    probe: Row
    config: str
    options: Row
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
        ValueError: If there is none, or one of its files is damaged.
    """
    if not (folder / METRICS_FILE).exists():
        raise ValueError(
            f"there is no run in {folder}: {METRICS_FILE} is missing. Give the --out_dir of a run "
            "that has trained for at least train.log_every steps."
        )
    config = _text(folder / CONFIG_FILE)
    return RunFiles(
        folder=folder,
        metrics=read_metrics(folder),
        routing=read_routing(folder),
        summary=read_summary(folder),
        probe=read_probe(folder),
        config=config,
        options=_options(config, folder / CONFIG_FILE),
        plan=_text(folder / "plan.txt"),
    )


def _text(file: Path) -> str:
    return read_text(file) if file.exists() else ""


def _options(config: str, file: Path) -> Row:
    if not file.exists():
        return {}
    try:
        found = parse_yaml(config, file)
        if problem := misfit_of_parts(found, {"model": Mapping, "data": Mapping}):
            raise DocumentError(f"{file} is damaged: {problem}")
    except DocumentError as error:
        raise DocumentError(f"{error}. Copy the one of a checkpoint of this run.") from error
    return found
