"""Draw what requests cost: a panel a model, time over candidates, of every form of it.

    python -m benchmarks.serving_plot benchmarks/results/serving.jsonl --out docs/serving.png

Of a case that was measured more than once, the last lines count; lines of one thread, tables in
fp32 and one commit, the last, are drawn.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import read_lines

__all__ = ["draw_requests", "main"]

Line = Mapping[str, Any]

FORMS = {"eager": "C7", "program": "C0", "request": "C2", "package": "C1"}
PROVIDERS = {"plain": "-", "experts": "--"}
NAMES = {"bst": "BST, experts on its head", "din": "DIN, experts on its head"}
NAMES |= {"dlrm": "DLRM, experts on all maps"}


def draw_requests(lines: Sequence[Line], file: Path) -> None:
    """Draw lines of ``bench_serving``.

    Args:
        lines: What was measured.
        file: Where to write it; its ending says in which format.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "draw_requests needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from error
    found = [it for it in lines if it.get("tables") == "fp32" and it.get("threads") == 1]
    if not found:
        raise ValueError("no line is of a request by one thread with tables in fp32")
    last = found[-1]
    found = [it for it in found if it["commit"] == last["commit"]]
    models = [name for name in NAMES if any(line["model"] == name for line in found)]
    figure = Figure(figsize=(4.2 * len(models), 4.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models, strict=True):
        for form, color in FORMS.items():
            for provider, style in PROVIDERS.items():
                curve = sorted(
                    (line["candidates"], line["median_us"] / 1000)
                    for line in found
                    if (line["model"], line["form"], line["provider"]) == (model, form, provider)
                )
                if not curve:
                    continue
                label = f"{form}, {'with experts' if provider == 'experts' else provider}"
                at, times = [count for count, _ in curve], [time for _, time in curve]
                panel.plot(at, times, style, color=color, marker=".", label=label)
        panel.set(xscale="log", yscale="log", xlabel="candidates of a request", title=NAMES[model])
        counts = sorted({line["candidates"] for line in found})
        panel.set_xticks(counts, [f"{count:,}" for count in counts])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("median, milliseconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"A request by one thread ({last['device']}, torch {last['torch']})")
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str]) -> int:
    """Draw a file of lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lines", type=Path, help="JSON lines of bench_serving")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    try:
        draw_requests(read_lines(args.lines), args.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
