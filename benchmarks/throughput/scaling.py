"""How throughput grows with ranks, from the lines of a file."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TOLD_APART", "by_case", "lines_from", "scaling_table", "strong", "weak"]

VARIES = ("world_size", "batch_size")
TOLD_APART = ("backbone", "layers", "experts", "sites", "pipeline", "feed", "length")
TOLD_APART += ("max_length", "rows", "width", "precision", "dataset", "options")


def lines_from(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """Return the lines of a file from a byte on."""
    with path.open() as source:
        source.seek(offset)
        return [json.loads(line) for line in source]


def scaling_table(path: Path, offset: int = 0) -> str:
    """Return a Markdown table of strong and weak scaling, for each case on several ranks.

    Strong: the same global batch. Weak: the same rows of each rank. Efficiency is throughput over
    that of the fewest ranks, times what the ranks are more.
    """
    rows = ["| case | scaling | ranks | batch | samples/s | speed-up | efficiency |"]
    rows.append("|---|---|---|---|---|---|---|")
    for lines in by_case(lines_from(path, offset)).values():
        for kind, group in (("strong", strong(lines)), ("weak", weak(lines))):
            if len(group) < 2:
                continue
            first = group[0]
            for line in group:
                faster = line["samples_per_second"] / first["samples_per_second"]
                share = faster * first["world_size"] / line["world_size"]
                unsure = "" if line["conclusive"] and first["conclusive"] else " (spread too wide)"
                rows.append(
                    f"| {_title(line)} | {kind} | {line['world_size']} | {line['batch_size']} | "
                    f"{line['samples_per_second']:,.0f} | {faster:.2f} | {share:.0%}{unsure} |"
                )
    return "\n".join(rows)


def by_case(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group lines of throughput that differ in ranks and batch alone."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("bench") == "train_throughput":
            found.setdefault(json.dumps([line[key] for key in TOLD_APART]), []).append(line)
    return found


def strong(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of one global batch, that which most numbers of ranks share."""
    return _shared(lines, lambda line: line["batch_size"])


def weak(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines with as many rows a rank, as many as most numbers of ranks have."""
    return _shared(lines, lambda line: line["batch_size"] / line["world_size"])


def _shared(
    lines: Sequence[Mapping[str, Any]], what: Callable[[Mapping[str, Any]], float]
) -> list[Mapping[str, Any]]:
    groups: dict[float, list[Mapping[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["world_size"]):
        groups.setdefault(what(line), []).append(line)
    return max(groups.values(), key=lambda group: len({line["world_size"] for line in group}))


def _title(line: Mapping[str, Any]) -> str:
    experts = f"L={line['layers']} E={line['experts']}" if line["layers"] else "plain"
    return f"{line['backbone']} {experts}, {line['pipeline']}, {line['feed']}"
