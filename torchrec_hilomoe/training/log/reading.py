"""What a run has written into its folder, read back: its lines and its summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_hilomoe.hilomoe import Gain
from torchrec_hilomoe.runtime.documents import (
    DocumentError,
    misfit_of_parts,
    parse_json,
    read_lines,
    read_text,
)

__all__ = [
    "METRICS_FILE",
    "PROBE_FILE",
    "ROUTING_FILE",
    "SUMMARY_FILE",
    "lines_before",
    "read_metrics",
    "read_probe",
    "read_routing",
    "read_summary",
]

METRICS_FILE = "metrics.jsonl"
PROBE_FILE = "probe.json"
ROUTING_FILE = "routing.jsonl"
SUMMARY_FILE = "summary.json"
LINE = {"step": int, "stage": str, "split": str}
LOAD = {"step": int, "layer": int, "load": tuple[float, ...], "entropy": float}
SUMMARY = {
    "recipe": str,
    "dataset": str,
    "test": Mapping[str, float | None],
    "best_auc": float | None,
    "samples_per_second": float | None,
    "parameters": Mapping[str, int],
    "flops": Mapping[str, int],
    "lookup_bytes": float,
    "steps": int,
    "world_size": int,
    "versions": Mapping[str, str | None],
    "route_by": Mapping[str, Any] | None,
    "without_experts": Mapping[str, Any] | None,
}
PROBE = {
    "verdict": str,
    "features": tuple[Gain, ...],
    "controls": Mapping[str, tuple[Gain, ...]],
}
MEND = "Take out what is no line of a run's log."
REMEDY = "Remove it, and run the same command again, which goes on from the newest checkpoint."

Row = Mapping[str, Any]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics of a run.

    Raises:
        DocumentError: Naming the line that is none.
    """
    try:
        return read_lines(folder / METRICS_FILE, LINE, float | None)
    except DocumentError as error:
        raise DocumentError(f"{error}. {MEND}") from error


def read_routing(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of routing of a run.

    Raises:
        DocumentError: Naming the line that is none, or does not follow those before.
    """
    file = folder / ROUTING_FILE
    try:
        rows = read_lines(file, LOAD)
    except DocumentError as error:
        raise DocumentError(f"{error}. {MEND}") from error
    before: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        # Before sites could share a router by name, a line said "site".
        row["router"] = str(row.get("router", row.get("site")))
        last = before.setdefault((row["router"], row["layer"]), row)
        if row["step"] < last["step"] or len(row["load"]) != len(last["load"]) or not row["load"]:
            raise DocumentError(
                f"{file}, line {number}, does not follow those before: step {row['step']} with "
                f"{len(row['load'])} experts after step {last['step']} with {len(last['load'])}. "
                "Remove that line."
            )
        before[row["router"], row["layer"]] = row
    return rows


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of a run; empty if there is none yet.

    Raises:
        DocumentError: If it is torn or damaged.
    """
    return _read_document(folder / SUMMARY_FILE, SUMMARY)


def read_probe(folder: Path) -> dict[str, Any]:
    """Read what a run that routes by itself has found; empty if it has not.

    Raises:
        DocumentError: If it is torn or damaged.
    """
    return _read_document(folder / PROBE_FILE, PROBE)


def _read_document(file: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = parse_json(read_text(file), file)
        if problem := misfit_of_parts(found, types):
            raise DocumentError(f"{file} is damaged: {problem}")
    except FileNotFoundError:
        return {}
    except DocumentError as error:
        raise DocumentError(f"{error}. {REMEDY}") from error
    return found


def lines_before(text: str, step: int) -> list[str]:
    """Return the lines of a log up to a step, without a test, and without what is no line."""
    return [line for line in text.splitlines() if _is_before(line, step)]


def _is_before(line: str, step: int) -> bool:
    try:
        row = parse_json(line, "a line")
    except DocumentError:
        return False
    return not misfit_of_parts(row, LINE, LINE) and row["step"] <= step and row["split"] != "test"
