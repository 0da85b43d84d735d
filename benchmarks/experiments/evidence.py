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
from benchmarks.experiments.runs import Case, Data, probe, read, ROOT, train, TUNING_SEED
from benchmarks.harness import append, environment
from torchrec_hilomoe.hilomoe.probe.advice import LASTING_GAIN

RESULTS = ROOT / "benchmarks/results/evidence.jsonl"
PROBES = ROOT / "benchmarks/results/probes.jsonl"
BACKBONES = ("din", "dien", "bst", "transact", "interformer")


# In `smooth` nothing chooses a map; it is a control.
WORLD_ROUTES = {
    "composed": "[[category], [hour], [category_history]]",
    "tree": "[[category], [category], [category]]",
    "smooth": "[[category], [hour], [category_history]]",
}
PREPARED = {
    "ml-1m": ("bst-movielens", "[[genre_set], [age], [history_genre_set]]"),
    "beauty": ("bst-amazon-beauty", "[[category], [attributes], [history_category]]"),
    "toys": ("bst-amazon-toys", "[[category], [attributes], [history_category]]"),
    "trivago": ("bst-trivago", "[[rank], [platform], [history_action]]"),
}
DATA = {
    **{
        world: Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "768000",
                "data.eval_rows": "65536",
            },
            head=(64, 32),
            route_by=WORLD_ROUTES[world],
            tuned_on="composed",
        )
        for world in WORLD_ROUTES
    },
    # Streams as long as those on which prototypes found that learned routing pays.
    **{
        f"{world}-long": Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "6144000",
                "data.eval_rows": "65536",
                "checkpoint.every_steps": "6000",
            },
            head=(64, 32),
            route_by=WORLD_ROUTES[world],
            tuned_on="composed",
        )
        for world in ("composed", "tree")
    },
    # Of the default recipe's model, and long enough for a probe to listen before experts join.
    **{
        f"{world}-3m": Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "3072000",
                "checkpoint.every_steps": "1000",
            },
            head=(128, 64),
            route_by=WORLD_ROUTES[world],
            tuned_on=f"{world}-3m",
        )
        for world in WORLD_ROUTES
    },
    **{
        name: Data(recipe=recipe, head=(256, 128), route_by=route_by, prepared=True, tuned_on=name)
        for name, (recipe, route_by) in PREPARED.items()
    },
    # Thinned by `streams`: few clicks, and an hour that hardly varies.
    **{
        f"composed-{stream}": Data(
            recipe="bst-synthetic",
            head=(64, 32),
            route_by=WORLD_ROUTES["composed"],
            prepared=True,
            tuned_on="composed",
        )
        for stream in ("rare", "skewed")
    },
    # MovieLens with frozen vectors of its movies: of their titles, and drawn at random.
    **{
        f"ml-1m-{vectors}": Data(
            recipe=PREPARED["ml-1m"][0],
            options={"data.data_schema": "null"},
            head=(256, 128),
            route_by=PREPARED["ml-1m"][1],
            prepared=True,
            tuned_on="ml-1m",
        )
        for vectors in ("titles", "random")
    },
}

# Stand for what a probe finds, in options of a case.
PROBED = {"model.hilomoe.route_by": "probed"}
RANKED_LAST = {"model.hilomoe.route_by": "ranked last"}
PROBED_VARIANT = "head rank 4, probed"
LAYERS = 3

# Side by side in the table of all data sets and backbones.
COMPARED = (
    "wider",
    "auto",
    PROBED_VARIANT,
    "head rank 4",
    "head rank 4, random",
    "head rank 4, by side",
    "head rank 4, by feature",
    "head rank 4, by feature, random",
)

# What one can name where nothing is known.
SIDES = {"model.hilomoe.route_by": "[[candidate], [context], [histories]]"}

LEARNING_RATES = ("0.002", "0.004", "0.008")
TABLE_RATE = 50  # times the learning rate, as in the shipped recipes
EXPERT_RATES = ("1.0", "5.0")
FROZEN_SHARES = ("0.0", "0.03")
TUNED_VARIANT = "head rank 4"

# 450 steps of 3,000 without experts, of which the last 400 are listened to.
AUTO = {
    "model.hilomoe.route_by": "auto",
    "model.hilomoe.probe_steps": "400",
    "train.backbone_share": "0.15",
}


def experts(sites: str, rank: int, routing: str = "row") -> dict[str, str]:
    """Options of HiLoMoE with 3 layers of 8 experts."""
    return {
        "model.hilomoe.sites": f"[{sites}]",
        "model.hilomoe.rank": str(rank),
        "model.hilomoe.routing": routing,
    }


def variants(data: Data) -> dict[str, dict[str, str]]:
    """The models that are compared, by name."""
    head = data.head

    def dense(widths: Iterable[int]) -> dict[str, str]:
        return {"model.hilomoe": "null", "model.head": f"[{', '.join(map(str, widths))}]"}

    by_feature = {"model.hilomoe.route_by": data.route_by}
    own = {"model.head": f"[{', '.join(map(str, head))}]"}
    return {
        "plain": dense(head),
        "narrower": dense(width // 2 for width in head),
        "wider": dense(width * 2 for width in head),
        "widest": dense(width * 4 for width in head),
        "deeper": dense((*head, head[-1])),
        "head rank 1": own | experts("head", 1),
        "head rank 4": own | experts("head", 4),
        "all rank 1": own | experts("all", 1),
        "all rank 4": own | experts("all", 4),
        "head rank 4, random": own | experts("head", 4, "random"),
        "head rank 4, by sample": own | experts("head", 4, "sample"),
        "all rank 4, by sample": own | experts("all", 4, "sample"),
        "head rank 4, by side": own | experts("head", 4, "sample") | SIDES,
        "head rank 4, by feature": own | experts("head", 4, "sample") | by_feature,
        "head rank 4, auto": own | experts("head", 4, "sample") | AUTO,
        "head rank 4, by feature, random": own | experts("head", 4, "random") | by_feature,
        PROBED_VARIANT: own | experts("head", 4, "sample") | PROBED,
        "head rank 4, probed, random": own | experts("head", 4, "random") | PROBED,
        "head rank 4, probed, ranked last": own | experts("head", 4, "sample") | RANKED_LAST,
        "all rank 4, probed": own | experts("all", 4, "sample") | PROBED,
        "narrower, head rank 4, probed": {
            "model.head": f"[{', '.join(str(width // 2) for width in head)}]",
            **experts("head", 4, "sample"),
            **PROBED,
        },
    }


def tuning_cases(lines: list[Line], data: str, backbone: str, given: Mapping) -> Iterator[Case]:
    """The plain model at every rate; then, its rate being known, experts at theirs."""
    models = variants(DATA[data])
    for rate in LEARNING_RATES:
        options = {**given, **models["plain"], **rates(rate)}
        yield Case(data=data, backbone=backbone, variant="plain", seed=TUNING_SEED, options=options)
    best = chosen(lines, data, backbone, "plain")
    if best is None:
        return
    for expert_lr_scale, frozen in product(EXPERT_RATES, FROZEN_SHARES):
        options = {
            **given,
            **models[TUNED_VARIANT],
            **rates(best["train.learning_rate"]),
            "train.expert_lr_scale": expert_lr_scale,
            "train.frozen_share": frozen,
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
    return {
        name: value
        for name, value in best["options"].items()
        if name.startswith("train.") and name.endswith(("rate", "frozen_share"))
    }


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
    given = dict(option.split("=", 1) for option in args.options)
    for seed, data, backbone in product(args.seeds, args.data, args.backbones):
        source = DATA[data].tuned_on
        plain = chosen(lines, source, backbone, "plain") or {}
        tuned = chosen(lines, source, backbone, TUNED_VARIANT) or plain
        for variant, model in variants(DATA[data]).items():
            if args.variants and variant not in args.variants:
                continue
            dense = "model.hilomoe" in model
            options = {**given, **model, **(plain if dense else tuned)}
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
    """The probe of a case's data, backbone and seed, from the probes' file if it is there."""
    key = (case.data, case.backbone, case.seed)
    with args.probing[key]:  # two cases that wait for the same probe
        for line in read(args.probes):
            if (line["data"], line["backbone"], line["seed"]) == key:
                return line
        models = variants(DATA[case.data])
        rates = {name: value for name, value in case.options.items() if name.startswith("train.")}
        options = {**models[PROBED_VARIANT], **rates, "model.hilomoe.route_by": "null"}
        asked = replace(case, variant="probe", options=options)
        line = probe(asked, DATA[case.data], args.work, args.prepared.get(case.data))
        append(args.probes, [{**line, **environment("cpu")}])
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
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
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
        given = dict(option.split("=", 1) for option in args.options)
        for data, backbone in product(args.data, args.backbones):
            # Twice: the rate that the first round finds is what the second starts from.
            while run_missing(tuning_cases(read(args.out), data, backbone, given), args):
                pass


if __name__ == "__main__":
    main()
