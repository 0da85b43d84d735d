"""Do experts pay? A grid of data, backbones, model variants and seeds, trained alike and compared.

    python -m benchmarks.experiments.evidence tune --data composed --backbones din bst
    python -m benchmarks.experiments.evidence run --data composed --backbones din bst --seeds 0 1 2
    python -m benchmarks.experiments.evidence probe --data composed --backbones din --seeds 0 1 2
    python -m benchmarks.experiments.evidence report --plot evidence.png

A run is ``apps/train.py`` in a process of its own, and one line in the results file. What is there
already is not run again, so a grid can be stopped and gone on with. Seeds are paired: the variants
of a seed share data, order and passes, and are compared after the last step, never in between.

Variants "probed" are routed by what ``apps/probe.py`` finds for the same data, backbone and seed.
It is run first, kept in the probes' file, and followed whether it advises experts or not. What a
short run with ``route_by: auto`` ends with is known from that: these experts where they are
advised, else the plain model, both to the bit (tests/integration/test_probe_first.py).

Rates are chosen by ``tune``: by validation AUC, on a seed that no comparison uses, the plain
model's first and then, for all expert variants together, the experts'. ``run`` looks the choice up
in the results file; without one, the recipe's rates hold. The test split is read once, by the runs
that are reported.

Real data are prepared by ``apps/prepare.py`` and named: ``--prepared ml-1m=data/ml-1m``.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Lock

from benchmarks.experiments.report import compare, compare_data, Line, report
from benchmarks.experiments.runs import Case, probe, read, ROOT, train, TUNING_SEED
from benchmarks.experiments.variants import (
    BACKBONES,
    COMPARED,
    DATA,
    LAYERS,
    PROBED,
    PROBED_VARIANT,
    RANKED_LAST,
    variants,
)
from benchmarks.harness import append, environment
from torchrec_hilomoe.hilomoe.probe.advice import LASTING_GAIN

RESULTS = ROOT / "benchmarks/results/evidence.jsonl"
PROBES = ROOT / "benchmarks/results/probes.jsonl"
LEARNING_RATES = ("0.002", "0.004", "0.008", "0.016")
DECAYS = ({}, {"train.decay.kind": "constant"})  # the first is the recipes': cosine
TABLE_RATE = 50  # times the learning rate, as in the shipped recipes
EXPERT_RATES = ("1.0", "5.0")
FROZEN_SHARES = ("0.0", "0.03")
OF_EXPERTS = ("train.expert_lr_scale", "train.frozen_share")
TUNED_VARIANT = "head rank 4"


def tuning_cases(lines: list[Line], data: str, backbone: str, given: Mapping) -> Iterator[Case]:
    """The plain model at every rate and decay; then, these being known, experts at theirs."""
    models = variants(DATA[data])
    for rate, decay in product(LEARNING_RATES, DECAYS):
        options = {**given, **models["plain"], **rates(rate), **decay}
        yield Case(data=data, backbone=backbone, variant="plain", seed=TUNING_SEED, options=options)
    best = chosen(lines, data, backbone, "plain")
    if best is None:
        return
    for expert_lr_scale, frozen in product(EXPERT_RATES, FROZEN_SHARES):
        options = {
            **given,
            **models[TUNED_VARIANT],
            **best,
            **dict(zip(OF_EXPERTS, (expert_lr_scale, frozen), strict=True)),
        }
        yield Case(
            data=data, backbone=backbone, variant=TUNED_VARIANT, seed=TUNING_SEED, options=options
        )


def rates(learning_rate: str) -> dict[str, str]:
    """A learning rate, and the tables' that goes with it."""
    table_rate = round(TABLE_RATE * float(learning_rate), 6)
    return {"train.learning_rate": learning_rate, "train.table_learning_rate": str(table_rate)}


def chosen(lines: list[Line], data: str, backbone: str, variant: str) -> dict[str, str] | None:
    """The options under ``train`` of the tuning run with the best validation AUC, if there is."""
    runs = [
        line
        for line in lines
        if (line["data"], line["backbone"], line["variant"], line["seed"])
        == (data, backbone, variant, TUNING_SEED)
    ]
    if not runs:
        return None
    best = max(runs, key=lambda line: line["valid"]["auc"])
    return _training(best)


def _training(line: Line) -> dict[str, str]:
    return {name: value for name, value in line["options"].items() if name.startswith("train.")}


def tuned(lines: list[Line], data: str, backbone: str) -> tuple[dict[str, str], dict[str, str]]:
    """The plain model's options as they were chosen, and experts' beside these; the recipe's: none.

    Experts were tuned at whatever the plain model's best was by then: a later one leaves them out.
    """
    plain = chosen(lines, data, backbone, "plain") or {}
    beside = [
        line
        for line in lines
        if plain == {k: v for k, v in _training(line).items() if k not in OF_EXPERTS}
    ]
    return plain, chosen(beside, data, backbone, TUNED_VARIANT) or plain


def advised(found: Line) -> bool:
    """Whether experts are advised by what a probe found; its own word, under today's line."""
    later = found.get("later")
    return found["pays"] and (later is None or later["total"] >= LASTING_GAIN)


def with_auto(lines: Sequence[Line], probes: Sequence[Line]) -> list[Line]:
    """The lines, and those of what ``route_by: auto`` ends with, each a copy of the run it is."""
    ends = {
        (it["data"], it["backbone"], it["seed"], PROBED_VARIANT if advised(it) else "plain")
        for it in probes
    }
    return [
        *lines,
        *(
            {**line, "variant": "auto"}
            for line in lines
            if (line["data"], line["backbone"], line["seed"], line["variant"]) in ends
        ),
    ]


def grid(lines: list[Line], args: argparse.Namespace) -> Iterator[Case]:
    """The runs to compare, seed by seed, so that a stopped grid has whole pairs."""
    for seed, data, backbone in product(args.seeds, args.data, args.backbones):
        plain, experts = tuned(lines, DATA[data].tuned_on, backbone)
        for variant, model in variants(DATA[data]).items():
            if args.variants and variant not in args.variants:
                continue
            dense = "model.hilomoe" in model
            options = {**(plain if dense else experts), **args.options, **model}
            yield Case(data=data, backbone=backbone, variant=variant, seed=seed, options=options)


def train_one(case: Case, args: argparse.Namespace) -> Line:
    """Run a case of the grid, after the probe that says what routes its experts."""
    asked = {"model.hilomoe.route_by": case.options.get("model.hilomoe.route_by")}
    route_by = None
    if asked in (PROBED, RANKED_LAST):
        route_by = views(probe_one(case, args), last=asked == RANKED_LAST)
    return train(
        case,
        DATA[case.data],
        args.work,
        args.prepared.get(case.data),
        route_by=route_by,
        output_ratio=args.output_ratio,
    )


def probe_one(case: Case, args: argparse.Namespace) -> Line:
    """The probe of a case's data, backbone and seed, from the probes' file if it is there.

    It is of the same plain model for all variants, under the options that were given to all.
    """
    key = (case.data, case.backbone, case.seed)
    with args.probing[key]:  # two cases that wait for the same probe
        for line in read(args.probes):
            same = (line["data"], line["backbone"], line["seed"]) == key
            if same and line.get("given", {}) == args.options:
                return line
        models = variants(DATA[case.data])
        rates = {name: value for name, value in case.options.items() if name.startswith("train.")}
        options = {**rates, **args.options, **models[PROBED_VARIANT]}
        options["model.hilomoe.route_by"] = "null"
        asked = replace(case, variant="probe", options=options)
        line = probe(asked, DATA[case.data], args.work, args.prepared.get(case.data))
        given = {"given": args.options} if args.options else {}
        append(args.probes, [{**line, **given, **environment("cpu")}])
    print(f"{case.data:9s} {case.backbone:12s} seed {case.seed:<5d} {line['verdict']}", flush=True)
    return line


def views(report: Line, *, last: bool = False) -> list[list[str]]:
    """What routes each layer: the probe's choice, or the features with the least gains.

    Where no feature stands out, the best ones, to see what experts would have brought.
    """
    best: dict[str, float] = {}
    for found in report["features"]:
        best[found["name"]] = max(found["gain"], best.get(found["name"], found["gain"]))
    ranked = sorted(best, key=lambda name: best[name], reverse=not last)
    if report["route_by"] and not last:
        return report["route_by"]
    return [[ranked[layer % len(ranked)]] for layer in range(LAYERS)]


def run_missing(cases: Iterable[Case], args: argparse.Namespace) -> int:
    """Run what the results file lacks, and return how many runs that were."""
    lines, stamp = read(args.out), environment("cpu")
    missing = [case for case in cases if not any(case.same_as(line) for line in lines)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda case: train_one(case, args), missing):
            append(args.out, [{**line, **stamp}])
            score = line["valid" if line["test"] is None else "test"]["auc"]
            print(
                f"{line['data']:9s} {line['backbone']:12s} {line['variant']:24s} "
                f"seed {line['seed']:<5d} AUC {score:.5f}  {line['seconds']:.0f} s",
                flush=True,
            )
    return len(missing)


def main() -> None:
    """Tune, run, probe or report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["tune", "run", "probe", "report"])
    parser.add_argument("--data", nargs="+", choices=DATA, default=["composed"])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["din", "bst"])
    parser.add_argument("--variants", nargs="+", help="by default all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="NAME=VALUE", help="of every run and probe"
    )
    parser.add_argument("--prepared", nargs="*", default=[], metavar="DATA=FOLDER")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--probes", type=Path, default=PROBES, help="what probes found")
    parser.add_argument(
        "--output-ratio", action="store_true", help="measure what experts add, over their base"
    )
    parser.add_argument(
        "--pair",
        nargs=2,
        metavar="VARIANT",
        help="with report: what the first adds to the other, alone",
    )
    parser.add_argument(
        "--pair-data",
        nargs=2,
        choices=DATA,
        metavar="DATA",
        help="with report: what the same models gain from the first instead of the other, alone",
    )
    parser.add_argument("--plot", type=Path, help="draw AUC over FLOPs to this file")
    args = parser.parse_args()
    args.options = dict(option.split("=", 1) for option in args.options)
    args.probing = defaultdict(Lock)
    args.prepared = dict(pair.split("=", 1) for pair in args.prepared)
    known = variants(next(iter(DATA.values())))
    unknown = {*(args.variants or ()), *(args.pair or ())} - {*known, "auto"}
    if unknown:
        parser.error(f"no variant {unknown}; there are {', '.join(known)}")
    absent = [name for name in args.data if DATA[name].prepared and name not in args.prepared]
    if absent and args.action != "report":
        parser.error(f"say where {absent[0]} is prepared: --prepared {absent[0]}=FOLDER")
    if args.action == "report":
        order = [*product(DATA, BACKBONES)]
        lines = sorted(
            with_auto(read(args.out), read(args.probes)),
            key=lambda line: order.index((line["data"], line["backbone"])),
        )
        if args.pair:
            compare(lines, *args.pair)
        elif args.pair_data:
            compare_data(lines, *args.pair_data)
        else:
            report(lines, COMPARED)
            if args.plot:
                from benchmarks.experiments.plot import draw  # needs matplotlib, an extra

                draw(lines, args.plot)
    elif args.action == "run":
        run_missing(grid(read(args.out), args), args)
    elif args.action == "probe":
        args.variants = [PROBED_VARIANT]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda case: probe_one(case, args), grid(read(args.out), args)))
    else:
        for data, backbone in product(args.data, args.backbones):
            # Twice: the rate that the first round finds is what the second starts from.
            while run_missing(tuning_cases(read(args.out), data, backbone, args.options), args):
                pass


if __name__ == "__main__":
    main()
