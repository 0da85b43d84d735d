"""One run of an experiment: ``apps/train.py`` in a process of its own, and a line of what it said.

A line holds the run's name and options, so that what is there already need not be run again.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.experiments.report import Line
from benchmarks.harness import read_lines

__all__ = ["ROOT", "TUNING_SEED", "Case", "Data", "probe", "read", "train"]

ROOT = Path(__file__).parents[2]
TUNING_SEED = 1000

# With its gates as printed, InterFormer has hardly begun to learn when a world's rows are over.
OF_BACKBONE = {"interformer": {"model.interformer.gating": "self"}}


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on.

    Attributes:
        recipe: Whose settings hold where the grid says nothing.
        options: Beside them.
        head: Hidden widths of the plain model; wider and narrower ones are derived from it.
        route_by: Features that decide in each expert layer of the variants "by feature": what is
            known to choose the map in a generated world; else, chosen before any run, something
            of the candidate or its place, of who asks, and of the history.
        prepared: Whether the rows come from a folder.
        tuned_on: The data whose tuning chose the rates; where there was none, the recipe's hold.
    """

    recipe: str
    options: Mapping[str, str] = field(default_factory=dict)
    head: tuple[int, ...]
    route_by: str
    prepared: bool = False
    tuned_on: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    data: str
    backbone: str
    variant: str
    seed: int
    options: Mapping[str, str]

    @property
    def tuning(self) -> bool:
        """Whether it serves to choose options, and not to compare."""
        return self.seed == TUNING_SEED

    def same_as(self, line: Line) -> bool:
        """Whether a line of the results file is this run."""
        return (line["data"], line["backbone"], line["variant"], line["seed"]) == (
            self.data,
            self.backbone,
            self.variant,
            self.seed,
        ) and line["options"] == dict(self.options)


def train(
    case: Case,
    data: Data,
    work: Path,
    prepared: str | None = None,
    *,
    route_by: Sequence[Sequence[str]] | None = None,
    teacher: Path | None = None,
    artifact: Path | None = None,
    output_ratio: bool = True,
) -> Line:
    """Run a case and read what it wrote.

    Args:
        case: Which.
        data: What it trains on.
        work: Its folder is made in this one, and removed.
        prepared: The folder of its rows; None for a generated world.
        route_by: What routes the experts, where that is not known before a probe has run.
        teacher: An exported model that it learns from, besides the clicks.
        artifact: Where to export what it has learned; None exports nothing.
        output_ratio: Whether to measure what experts add, over what their base maps put out.

    Raises:
        RuntimeError: If it failed; its last words are in the message.
    """
    folder = work / str(abs(hash(str(case))))
    options = _options(case, data, prepared) | {"out_dir": str(folder)}
    if route_by is not None:
        options["model.hilomoe.route_by"] = json.dumps([list(names) for names in route_by])
    if teacher is not None:
        options["train.teacher"] = str(teacher)
    start = time.perf_counter()
    _command("apps/train.py", "--config", data.recipe, *_flags(options))
    summary = json.loads((folder / "summary.json").read_text())
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = str(folder / "checkpoints" / f"step_{summary['steps']}")
    line = {
        "data": case.data,
        "backbone": case.backbone,
        "variant": case.variant,
        "seed": case.seed,
        "options": dict(case.options),
        "route_by": route_by,
        "steps": summary["steps"],
        "valid": next(row for row in reversed(logged) if row["split"] == "valid"),
        "test": None if case.tuning else summary["test"],
        "best_auc": summary["best_auc"],
        "flops": summary["flops"]["total"],
        "parameters": summary["parameters"]["total"] - summary["parameters"]["tables"],
        "routing": _routing(folder / "routing.jsonl"),
        "output_ratio": _output_ratio(last, folder, case) if output_ratio else None,
        "samples_per_second": summary["samples_per_second"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if artifact is not None:
        _command("apps/export.py", last, "--out", str(artifact), "--split", "none")
    shutil.rmtree(folder)
    return line


def probe(case: Case, data: Data, work: Path, prepared: str | None = None) -> Line:
    """Probe the plain model of a case, whose experts are only thought of.

    Raises:
        RuntimeError: If it failed; its last words are in the message.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"probe-{case.data}-{case.backbone}-{case.seed}.json"
    flags = _flags(_options(case, data, prepared))
    start = time.perf_counter()
    _command("apps/probe.py", "--config", data.recipe, *flags, "--json", str(file))
    report = json.loads(file.read_text())
    file.unlink()
    return {
        "data": case.data,
        "backbone": case.backbone,
        "seed": case.seed,
        "options": dict(case.options),
        **report,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _options(case: Case, data: Data, prepared: str | None) -> dict[str, str]:
    options = {
        "model.backbone": case.backbone,
        "model.hilomoe.route_by": "null",  # whatever the recipe has; the variant says
        **OF_BACKBONE.get(case.backbone, {}),
        **data.options,
        **case.options,
        "seed": str(case.seed),
    }
    if data.prepared:
        assert prepared is not None
        options["data.path"] = prepared
    return options


def read(path: Path) -> list[Line]:
    """The lines that are there."""
    return read_lines(path) if path.exists() else []


def _routing(file: Path) -> dict[str, float] | None:
    """Of the last logged steps: the mean entropy of layers, and starved experts of all of them.

    An expert is starved that gets less than a tenth of its even share.
    """
    if not file.exists() or not (lines := read_lines(file)):
        return None
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    starved = [share < 0.1 / len(line["load"]) for line in last for share in line["load"]]
    return {
        "entropy": sum(line["entropy"] for line in last) / len(last),
        "starved": sum(starved),
    }


def _output_ratio(checkpoint: str, folder: Path, case: Case) -> float | None:
    """The mean over sites of what experts add, over what the base map puts out."""
    if "model.hilomoe" in case.options or case.tuning:
        return None
    found = folder / "routing.json"
    _command("apps/evaluate.py", checkpoint, "--split", "valid", "--out", str(found))
    routing = json.loads(found.read_text()).get("routing")
    if routing is None:  # `auto` found nothing
        return None
    sites = routing["sites"]
    return sum(site["output_ratio"] for site in sites) / len(sites)


def _flags(options: Mapping[str, str]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _command(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exited {done.returncode}: {done.stderr[-2000:]}")
