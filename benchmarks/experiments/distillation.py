"""Does a wide teacher help a narrow student with experts? Paired by seed with the same student.

    python -m benchmarks.experiments.distillation tune
    python -m benchmarks.experiments.distillation run --data composed --seeds 0 1 2
    python -m benchmarks.experiments.distillation report

The student is ``head rank 4, by feature`` of ``evidence.py``, at the rates that were tuned for it.
Its teacher is the same model with a head and embeddings of twice the width, trained on the same
rows and exported by ``apps/export.py``: a teacher a seed in a generated world, which is another one
with each seed, and on real data one for all, of a seed of its own. ``taught`` is the student once
more, from the same start, on the same rows in the same order, with the teacher's share in its loss.

That share and the temperature are chosen by ``tune``, for all data: by validation AUC in the world
``composed``, on a seed that no comparison uses. The test split is read by ``run`` alone.
"""

import argparse
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from benchmarks.experiments import evidence
from benchmarks.experiments.evidence import chosen, TUNED_VARIANT
from benchmarks.experiments.report import difference, differences, grouped, Line, mean
from benchmarks.experiments.runs import Case, read, ROOT, train, TUNING_SEED
from benchmarks.experiments.variants import BACKBONES, DATA
from benchmarks.harness import append, environment

STUDENT = "head rank 4, by feature"
SCORES = ("auc", "logloss")
WEIGHTS = ("0.5", "1.0")
TEMPERATURES = ("1.0", "3.0")
WIDER = 2
TEACHER_SEED = 2000  # on real data
TUNED_ON = "composed"
EMBEDDING_DIMS = {"composed": 16, "trivago": 16, "toys": 32}  # of the recipes


def options_of(data: str, backbone: str, given: Mapping[str, str]) -> dict[str, str]:
    """The student's; ``given`` are those of the command line."""
    rates = chosen(read(evidence.RESULTS), DATA[data].tuned_on, backbone, TUNED_VARIANT)
    return {**given, **evidence.variants(DATA[data])[STUDENT], **(rates or {})}


def wider(options: Mapping[str, str], data: str) -> dict[str, str]:
    """The teacher's options, from the student's."""
    head = [WIDER * width for width in DATA[data].head]
    return {
        **options,
        "model.head": str(head),
        "model.embedding_dim": str(WIDER * EMBEDDING_DIMS[data]),
    }


def soft(weight: str, temperature: str) -> dict[str, str]:
    """Options of the teacher's term in the loss."""
    return {"train.teacher_weight": weight, "train.teacher_temperature": temperature}


def best(lines: list[Line], backbone: str) -> dict[str, str]:
    """The teacher's share and temperature with the best validation AUC.

    Raises:
        ValueError: If they have not been tuned.
    """
    runs = [
        line
        for line in lines
        if (line["data"], line["backbone"], line["variant"]) == (TUNED_ON, backbone, "taught")
        and line["seed"] == TUNING_SEED
    ]
    if not runs:
        raise ValueError(f"tune the teacher's term first: tune --backbones {backbone}")
    options = max(runs, key=lambda line: line["valid"]["auc"])["options"]
    return soft(options["train.teacher_weight"], options["train.teacher_temperature"])


class Experiment:
    """Runs on one data set with one backbone, and their lines."""

    def __init__(self, data: str, backbone: str, args: argparse.Namespace) -> None:
        self.data, self.backbone, self.args = data, backbone, args
        given = dict(option.split("=", 1) for option in args.options)
        self.student = options_of(data, backbone, given)

    def tune(self) -> None:
        """Train the student with every share and temperature."""
        teacher = self._teacher_of(TUNING_SEED)
        for pair in product(WEIGHTS, TEMPERATURES):
            options = self.student | soft(*pair)
            self._train("taught", TUNING_SEED, options, teacher=teacher)

    def run(self, seeds: list[int]) -> None:
        """Train the student without and with its teacher, seed by seed."""
        chosen_term = best(read(self.args.out), self.backbone)
        for seed in seeds:
            teacher = self._teacher_of(seed)
            self._train("student", seed, self.student)
            self._train("taught", seed, self.student | chosen_term, teacher=teacher)

    def _teacher_of(self, seed: int) -> Path:
        """Train and export the teacher of a seed's students, unless its folder is there."""
        seed = TEACHER_SEED if DATA[self.data].prepared else seed
        artifact = self.args.work.resolve() / f"{self.data}-{self.backbone}-{seed}"
        if not artifact.exists():
            self._train("teacher", seed, wider(self.student, self.data), artifact=artifact)
        return artifact

    def _train(
        self,
        variant: str,
        seed: int,
        options: Mapping[str, str],
        *,
        teacher: Path | None = None,
        artifact: Path | None = None,
    ) -> None:
        """Run a case, unless its line is there and nothing of it is to be exported."""
        case = Case(
            data=self.data, backbone=self.backbone, variant=variant, seed=seed, options=options
        )
        known = any(case.same_as(line) for line in read(self.args.out))
        if known and artifact is None:
            return
        line = train(
            case,
            DATA[self.data],
            self.args.work.resolve(),
            self.args.prepared.get(self.data),
            teacher=teacher,
            artifact=artifact,
            output_ratio=False,
        )
        if not known:
            append(self.args.out, [{**line, **environment("cpu")}])
        score = line["valid" if case.tuning else "test"]
        print(
            f"{self.data} {self.backbone} {variant} seed {seed} {dict(options)} "
            f"AUC {score['auc']:.5f} logloss {score['logloss']:.5f} {line['seconds']:.0f} s",
            flush=True,
        )


def tables(lines: list[Line]) -> Iterator[str]:
    """Markdown: what was tuned, and each model's scores beside the student's, in 1e-4."""
    yield "| data, backbone | weight | temperature | validation AUC |"
    yield "|---|---|---|---|"
    for line in lines:
        if line["test"] is None and line["variant"] != "teacher":
            weight = line["options"].get("train.teacher_weight", "none")
            temperature = line["options"].get("train.teacher_temperature", "")
            auc = line["valid"]["auc"]
            yield f"| {line['data']}, {line['backbone']} | {weight} | {temperature} | {auc:.5f} |"
    yield ""
    names = ["data, backbone", "model", "kFLOP/sample", *SCORES]
    names += [f"{score}, to the student" for score in SCORES]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for (data, backbone), runs in grouped(lines).items():
        for variant in ("student", "taught", "teacher"):
            own = [run for run in runs if run["variant"] == variant]
            if not own:
                continue
            cells = [f"{data}, {backbone}", variant, f"{own[0]['flops'] / 1e3:.1f}"]
            cells += [mean([run["test"][score] for run in own]) for score in SCORES]
            for score in SCORES:
                paired = differences(runs, variant, "student", score)
                cells.append(difference(paired) if paired and variant != "student" else "")
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Tune, run or report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["tune", "run", "report"])
    parser.add_argument("--data", nargs="+", choices=EMBEDDING_DIMS, default=["composed"])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["din"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--prepared", nargs="*", default=[], metavar="DATA=FOLDER")
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/distillation.jsonl")
    args = parser.parse_args()
    if args.action == "tune":
        args.data = [TUNED_ON]
    args.prepared = dict(pair.split("=", 1) for pair in args.prepared)
    if args.action == "report":
        print("\n".join(tables(read(args.out))))
        return
    for data, backbone in product(args.data, args.backbones):
        if DATA[data].prepared and data not in args.prepared:
            parser.error(f"say where {data} is prepared: --prepared {data}=FOLDER")
        experiment = Experiment(data, backbone, args)
        if args.action == "tune":
            experiment.tune()
        else:
            experiment.run(args.seeds)


if __name__ == "__main__":
    main()
