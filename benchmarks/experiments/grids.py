"""Small grids around the experts that are routed by named features: which options matter?

    python -m benchmarks.experiments.grids run --prepared toys=data/toys trivago=data/trivago
    python -m benchmarks.experiments.grids report --plot grids.png

One option at a time leaves its default (``model.hilomoe`` of a recipe: balance weight .01, no
gradient stopped, 3 layers of 8 experts of rank 4; rates and their decay as ``tune`` found; experts
join a backbone that was trained for a tenth of the steps, or a fifth on real data). Every value
shares seeds, rows and order with the default and with the plain model. Choose by validation AUC;
the test AUC is beside it.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.experiments.evidence import tuned
from benchmarks.experiments.report import difference, Line
from benchmarks.experiments.runs import Case, read, ROOT, train
from benchmarks.experiments.variants import DATA, variants
from benchmarks.harness import append, environment

RESULTS = ROOT / "benchmarks/results/grids.jsonl"
BY_FEATURE = "head rank 4, by feature"
DEFAULT, PLAIN = "default", "plain"

AXES: dict[str, dict[str, dict[str, str]]] = {
    "balance weight": {
        value: {"model.hilomoe.balance_weight": value} for value in ("0.0", "0.1", "1.0")
    },
    "stop gradient": {
        value: {"model.hilomoe.stop_gradient": value} for value in ("scores", "query")
    },
    "decay": {
        "constant": {"train.decay.kind": "constant"},
        "cosine": {"train.decay.kind": "cosine"},
        "linear": {"train.decay.kind": "linear"},
        "step": {"train.decay.kind": "step", "train.decay.every": "300"},
    },
    "backbone's age": {value: {"train.backbone_share": value} for value in ("0.0", "0.5", "0.9")},
    "keys' rate": {value: {"train.key_lr_scale": value} for value in ("0.2", "2.0", "5.0", "10.0")},
    "layers": {value: {"model.hilomoe.num_layers": value} for value in ("1", "4", "6", "8")},
    "rank": {value: {"model.hilomoe.rank": value} for value in ("1", "8")},
    "experts": {value: {"model.hilomoe.num_experts": value} for value in ("4", "16")},
}


# The default's place on each axis; of age as in the worlds, where real sets have 0.2.
DEFAULTS = {
    "balance weight": "0.01",
    "stop gradient": "none",
    "decay": "as tuned",
    "backbone's age": "0.1",
    "keys' rate": "1",
    "layers": "3",
    "rank": "4",
    "experts": "8",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of an axis, on one data set and backbone, with one seed."""

    axis: str
    value: str
    case: Case

    def same_as(self, line: Line) -> bool:
        """Whether a line of the results file is this cell."""
        return (line["axis"], line["value"]) == (self.axis, self.value) and self.case.same_as(line)


def cells(args: argparse.Namespace, tuning: list[Line]) -> Iterator[Cell]:
    """Of every axis that is asked for; the default and the plain model belong to all of them."""
    for seed, data, backbone in product(args.seeds, args.data, args.backbones):
        models = variants(DATA[data])
        plain, experts = tuned(tuning, DATA[data].tuned_on, backbone)

        def cell(axis: str, value: str, **options: str) -> Cell:
            case = Case(
                data=data,  # noqa: B023  called at once
                backbone=backbone,  # noqa: B023
                variant=value,
                seed=seed,  # noqa: B023
                options=options,
            )
            return Cell(axis=axis, value=value, case=case)

        yield cell("", PLAIN, **models[PLAIN], **plain)
        default = models[BY_FEATURE] | experts
        yield cell("", DEFAULT, **default)
        for axis in args.axes:
            for value, options in AXES[axis].items():
                yield cell(axis, value, **(default | options | _views(data, options)))


def _views(data: str, options: dict[str, str]) -> dict[str, str]:
    """As many views as layers: the named features in turn."""
    if "model.hilomoe.num_layers" not in options:
        return {}
    named = DATA[data].route_by.strip("[]").split("], [")
    layers = int(options["model.hilomoe.num_layers"])
    views = ", ".join(f"[{named[layer % len(named)]}]" for layer in range(layers))
    return {"model.hilomoe.route_by": f"[{views}]"}


def run_missing(wanted: list[Cell], args: argparse.Namespace) -> None:
    """Run what the results file lacks."""
    lines, stamp = read(args.out), environment("cpu")
    missing = [cell for cell in wanted if not any(cell.same_as(line) for line in lines)]

    def run(cell: Cell) -> Line:
        prepared = args.prepared.get(cell.case.data)
        line = train(cell.case, DATA[cell.case.data], args.work, prepared, output_ratio=False)
        return {"axis": cell.axis, "value": cell.value, **line}

    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(run, missing):
            append(args.out, [{**line, **stamp}])
            auc = [f"{split} {line[split]['auc']:.5f}" for split in ("valid", "test")]
            where = f"{line['data']} {line['backbone']}, {line['axis']} {line['value']}"
            print(f"{where}, seed {line['seed']}: {', '.join(auc)}", flush=True)


def paired(lines: list[Line], line: Line, split: str, against: str) -> float | None:
    """AUC less that of the default, or of the plain model, of the same seed, in 1e-4."""
    for other in lines:
        if other["value"] == against and not other["axis"] and _place(other) == _place(line):
            return 1e4 * (line[split]["auc"] - other[split]["auc"])
    return None


def _place(line: Line) -> tuple:
    return line["data"], line["backbone"], line["seed"]


def report(lines: list[Line]) -> None:
    """A row a value: against the default, by validation and by test; balance of the routers."""
    for data, backbone in dict.fromkeys((it["data"], it["backbone"]) for it in lines):
        own = [it for it in lines if (it["data"], it["backbone"]) == (data, backbone)]
        print(f"\n### {data}, {backbone}\n")
        print(
            "| option | value | valid, to the default | test, to the default | test, to plain "
            "| entropy | starved experts |"
        )
        print("|---" * 7 + "|")
        for axis, value in dict.fromkeys((it["axis"], it["value"]) for it in own):
            same = [it for it in own if (it["axis"], it["value"]) == (axis, value)]
            rows = [
                [
                    found
                    for it in sorted(same, key=lambda it: it["seed"])
                    if (found := paired(own, it, split, against)) is not None
                ]
                for split, against in (("valid", DEFAULT), ("test", DEFAULT), ("test", PLAIN))
            ]
            routed = [it["routing"] for it in same if it.get("routing")]
            entropy = f"{np.mean([it['entropy'] for it in routed]):.3f}" if routed else ""
            starved = f"{np.mean([it['starved'] for it in routed]):.1f}" if routed else ""
            texts = [difference(row) if row else "" for row in rows]
            print(f"| {axis} | {value} | {' | '.join(texts)} | {entropy} | {starved} |")


def draw(lines: list[Line], picture: Path) -> None:
    """A panel an option: test AUC against the default, a line a data set, seeds as dots."""
    from matplotlib import pyplot as plt  # an extra

    axes_ = [axis for axis in AXES if any(it["axis"] == axis for it in lines)]
    places = list(dict.fromkeys((it["data"], it["backbone"]) for it in lines))
    columns = 3
    rows = -(-len(axes_) // columns)
    size = (3.2 * columns, 2.8 * rows + 0.6)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, axis in zip(panels.flat, axes_, strict=False):
        labels = {DEFAULT: DEFAULTS[axis], **{value: value for value in AXES[axis]}}
        values = sorted(labels, key=lambda value: _rank(labels[value]))  # noqa: B023  at once
        for at, (data, backbone) in enumerate(places):
            own = [it for it in lines if (it["data"], it["backbone"]) == (data, backbone)]
            means = []
            for x, value in enumerate(values):
                gains = [
                    found
                    for it in own
                    if (it["axis"], it["value"]) in ((axis, value), ("", value))
                    and (found := paired(own, it, "test", DEFAULT)) is not None
                ]
                panel.plot([x] * len(gains), gains, ".", color=f"C{at}", alpha=0.4)
                means.append(np.mean(gains) if gains else np.nan)
            panel.plot(range(len(values)), means, color=f"C{at}", label=f"{data}, {backbone}")
        panel.axhline(0, color="grey", linewidth=0.6)
        ticks = [f"{labels[value]}\n(default)" if value == DEFAULT else value for value in values]
        panel.set_xticks(range(len(values)), ticks)
        panel.set_title(axis)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(axes_) :]:
        panel.axis("off")
    for panel in panels[:, 0]:
        panel.set_ylabel("test AUC less the default's, 1e-4")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Experts routed by named features, one option away from the default")
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _rank(label: str) -> tuple[bool, float]:
    """Numbers in their order, after words in theirs."""
    try:
        return True, float(label)
    except ValueError:
        return False, 0.0


def main() -> None:
    """Run or report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--data", nargs="+", choices=DATA, default=["composed", "toys", "trivago"])
    parser.add_argument("--backbones", nargs="+", default=["din"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prepared", nargs="*", default=[], metavar="DATA=FOLDER")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/grids"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--tuned", type=Path, default=ROOT / "benchmarks/results/evidence.jsonl", help="for rates"
    )
    parser.add_argument("--plot", type=Path, help="draw it to this file")
    args = parser.parse_args()
    args.prepared = dict(pair.split("=", 1) for pair in args.prepared)
    if args.action == "run":
        run_missing(list(cells(args, read(args.tuned))), args)
        return
    lines = read(args.out)
    report(lines)
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    main()
