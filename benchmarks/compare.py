"""Two result files, or two commits of one, case by case: what changed, and what is only noise.

    python -m benchmarks.compare BEFORE.jsonl AFTER.jsonl
    python -m benchmarks.compare RESULTS.jsonl --commits 64ecd0f 5988678
    python -m benchmarks.compare BEFORE.jsonl AFTER.jsonl --figure phase_ms.lookup

Lines belong to one case if they agree in everything but figures, versions and the machine. Several
lines of a case are pooled: their median, and as noise the larger of the spread that they recorded
and their range. A change counts if it is larger than both sides' noise together (the root of the
sum of squares); with a noise above a tenth, nothing is concluded. Without ``--commits``, each case
is represented by the commit that stands last in its file.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import TOO_WIDE

__all__ = ["Comparison", "Side", "case_of", "compare", "main", "table"]

Line = Mapping[str, Any]

VERSIONS = ("commit", "torch", "torchrec", "fbgemm", "fuxictr", "pyarrow")
MACHINE = ("device", "threads")
ON_GPU = "forward_backward.graph.hilomoe_eager"
# The figure that is compared, unless another is asked for, is the first that a line has; each with
# what says how much it spreads: a share of it, or an amount of the figure named beside.
FIGURES: Mapping[str, tuple[str, str | None]] = {
    "samples_per_second": ("spread", None),
    "rows_per_second": ("iqr_us", "median_us"),
    "median_us": ("iqr_us", "median_us"),
    "throughput": ("throughput_iqr", "throughput"),
    "run_ms": ("", None),
    "step_ms": ("", None),
    "ratio": ("ratio_iqr", "ratio"),
    f"{ON_GPU}.ratio": (f"{ON_GPU}.ratio_iqr", f"{ON_GPU}.ratio"),
    "test.auc": ("", None),
}
# Numbers that were counted or measured, and so do not tell one case from another; those with a
# fraction, and groups of numbers, never do.
MEASURED = {"auc", "best_auc", "command", "conclusive", "file_mb", "flops", "flops_per_sample"}
MEASURED |= {"parameters", "peak_bytes", "peak_mb", "process_bytes", "reading_mb", "rounds"}
MEASURED |= {"sent_bytes", "state_bytes", "steps"}
HIGHER_IS_BETTER = ("per_second", "share", "throughput", "auc", "of_pyarrow")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side's lines of a case, pooled.

    Attributes:
        value: Their median.
        noise: As a share of it; None if nothing is known of it.
        lines: How many.
    """

    value: float
    noise: float | None
    lines: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A case on both sides.

    Attributes:
        case: By what it is told from others.
        figure: What is compared.
        before: The first side.
        after: The second.
        machine: That measured both, or the first.
    """

    case: Mapping[str, Any]
    figure: str
    before: Side
    after: Side
    machine: str

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after.value / self.before.value

    @property
    def noise(self) -> float | None:
        """Both sides' together."""
        if self.before.noise is None or self.after.noise is None:
            return None
        return math.hypot(self.before.noise, self.after.noise)

    @property
    def verdict(self) -> str:
        """What can be concluded."""
        noise = self.noise
        if noise is None:
            return "no spread recorded"
        if max(self.before.noise or 0.0, self.after.noise or 0.0) > TOO_WIDE:
            return "spread too wide to conclude"
        if max(self.ratio, 1 / self.ratio) - 1 <= noise:
            return "within noise"
        rises = self.ratio > 1
        return "better" if rises == _higher_is_better(self.figure) else "worse"


def case_of(line: Line) -> dict[str, Any]:
    """Return what tells a line's case from others."""
    told: dict[str, Any] = {}
    for name, value in line.items():
        measured = name in MEASURED or isinstance(value, float)
        measured |= isinstance(value, dict) and name != "options"
        if not measured and name not in (*VERSIONS, *MACHINE, *FIGURES):
            told[name] = value
    return told


def compare(
    before: Sequence[Line],
    after: Sequence[Line],
    *,
    figure: str | None = None,
    force: bool = False,
) -> list[Comparison]:
    """Pair lines by case and compare them.

    Args:
        before: The first side's lines.
        after: The second's.
        figure: Which, by its dotted name; None is the first of the usual ones that a line has.
        force: Whether to compare what different machines measured, too.

    Raises:
        ValueError: If no case is on both sides, or one is but was measured by other machines.
    """
    sides = [_by_case(lines) for lines in (before, after)]
    found: list[Comparison] = []
    apart: set[str] = set()
    for case, mine in sides[0].items():
        theirs = sides[1].get(case, {})
        shared = [machine for machine in mine if machine in theirs]
        pairs = [(mine[machine], theirs[machine]) for machine in shared]
        if theirs and not shared:
            apart.add(f"{' and '.join(mine)} against {' and '.join(theirs)}")
            pairs = [(_all(mine), _all(theirs))]
        for one, other in pairs:
            name = figure or _usual_figure(one[0])
            if name is not None and (compared := _compared(one, other, name)) is not None:
                found.append(compared)
    if apart and not force:
        raise ValueError(
            f"the sides were measured on different machines ({'; '.join(sorted(apart))}), so their "
            "ratio says nothing about the code. Measure both on one machine with as many threads, "
            "or give --force."
        )
    if not found:
        raise ValueError(
            f"no case with {figure or 'a usual figure'} is on both sides ({len(sides[0])} cases "
            f"before, {len(sides[1])} after). Compare results of one benchmark, with equal options."
        )
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table, a row a case; what all cases share is left out."""
    shared = {
        name
        for name in set().union(*(it.case for it in comparisons))
        if len({json.dumps(it.case.get(name)) for it in comparisons}) == 1
    }
    rows = ["| case | figure | before | after | after / before | noise | verdict |"]
    rows.append("|---|---|---|---|---|---|---|")
    machines = {it.machine for it in comparisons}
    for it in comparisons:
        told = [f"{name} {value}" for name, value in it.case.items() if name not in shared]
        told += [it.machine] * (len(machines) > 1)
        noise = "?" if it.noise is None else f"± {it.noise:.0%}"
        rows.append(
            f"| {', '.join(told) or 'the only one'} | {it.figure} | {_shown(it.before)} | "
            f"{_shown(it.after)} | {it.ratio:.3f} | {noise} | {it.verdict} |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str]) -> int:
    """Print the comparison and return 0, or 2 if there is none to make."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", type=Path, nargs="+", help="two, or one and --commits")
    parser.add_argument("--commits", nargs=2, metavar=("BEFORE", "AFTER"), help="as recorded")
    parser.add_argument("--figure", help="by its name, dotted where it is one of a group")
    parser.add_argument("--force", action="store_true", help="compare different machines, too")
    args = parser.parse_args(argv)
    try:
        before, after = _sides(args.files, args.commits)
        found = compare(before, after, figure=args.figure, force=args.force)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, lines in (("before", before), ("after", after)):
        print(f"{name}: {_told(lines)}")
    print(table(found))
    cases = [{json.dumps(case_of(line)) for line in lines} for lines in (before, after)]
    for name, alone in (("before", cases[0] - cases[1]), ("after", cases[1] - cases[0])):
        if alone:
            print(f"{len(alone)} cases are {name} alone")
    return 0


def _sides(
    files: Sequence[Path], commits: tuple[str, str] | None
) -> tuple[Sequence[Line], Sequence[Line]]:
    if len(files) > 2 or (len(files) == 1 and commits is None):
        raise ValueError(f"give two files, or one and --commits BEFORE AFTER, got {len(files)}.")
    one, other = _read(files[0]), _read(files[-1])
    if commits is None:
        return _newest(one), _newest(other)
    return _of_commit(one, commits[0], files[0]), _of_commit(other, commits[1], files[-1])


def _read(path: Path) -> list[Line]:
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}); remove it.") from error
    if not lines:
        raise ValueError(f"{path} has no line.")
    return lines


def _of_commit(lines: Sequence[Line], commit: str, path: Path) -> list[Line]:
    dirty = commit.endswith("-dirty")
    commits = list(dict.fromkeys(str(line.get("commit", "none")) for line in lines))
    chosen = [it for it in commits if it.startswith(commit) and it.endswith("-dirty") == dirty]
    if len(chosen) != 1:
        raise ValueError(
            f"--commits: {commit!r} is {len(chosen)} of the commits in {path}, which are "
            f"{', '.join(commits)}. Name one of them."
        )
    return [line for line in lines if line.get("commit", "none") == chosen[0]]


def _newest(lines: Sequence[Line]) -> list[Line]:
    """Of each case on each machine, the lines of the commit that stands last."""
    last = {_key(line): line.get("commit") for line in lines}
    return [line for line in lines if line.get("commit") == last[_key(line)]]


def _key(line: Line) -> str:
    return json.dumps([case_of(line), _machine(line)], sort_keys=True)


def _machine(line: Line) -> str:
    return f"{line.get('device', 'an unknown device')} with {line.get('threads', '?')} threads"


def _by_case(lines: Sequence[Line]) -> dict[str, dict[str, list[Line]]]:
    found: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        case = json.dumps(case_of(line), sort_keys=True)
        found.setdefault(case, {}).setdefault(_machine(line), []).append(line)
    return found


def _all(machines: Mapping[str, list[Line]]) -> list[Line]:
    return [line for lines in machines.values() for line in lines]


def _usual_figure(line: Line) -> str | None:
    names = [name for name in FIGURES if _number(line, name) is not None]
    return names[0] if names else None


def _compared(one: Sequence[Line], other: Sequence[Line], figure: str) -> Comparison | None:
    before, after = _pooled(one, figure), _pooled(other, figure)
    if before is None or after is None:
        return None
    return Comparison(
        case=case_of(one[0]),
        figure=figure,
        before=before,
        after=after,
        machine=_machine(one[0]),
    )


def _pooled(lines: Sequence[Line], figure: str) -> Side | None:
    values = [value for line in lines if (value := _number(line, figure)) is not None]
    if not values or min(values) <= 0:
        return None
    median = statistics.median(values)
    spreads = [spread for line in lines if (spread := _spread(line, figure)) is not None]
    noises = [statistics.median(spreads)] if spreads else []
    if len(values) > 1:
        noises.append((max(values) - min(values)) / median)
    return Side(value=median, noise=max(noises, default=None), lines=len(values))


def _number(line: Line, figure: str) -> float | None:
    value: Any = line
    for name in figure.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _spread(line: Line, figure: str) -> float | None:
    """As a share; what is not known of a figure itself is taken from the line's throughput."""
    name, over = FIGURES.get(figure, ("spread", None))
    spread = _number(line, name)
    whole = 1.0 if over is None else _number(line, over)
    return None if spread is None or not whole else spread / whole


def _higher_is_better(figure: str) -> bool:
    return figure.endswith(HIGHER_IS_BETTER)


def _shown(side: Side) -> str:
    pooled = f" ({side.lines} lines)" if side.lines > 1 else ""
    return f"{side.value:,.4g}{pooled}"


def _told(lines: Sequence[Line]) -> str:
    said = []
    for name in (*VERSIONS, *MACHINE):
        values = sorted({str(line[name]) for line in lines if name in line})
        if values:
            said.append(f"{name} {' and '.join(values)}")
    return ", ".join(said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
