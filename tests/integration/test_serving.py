"""From raw files to probabilities: prepare, train, export, score, each by its command."""

import json
import re
import runpy
import shutil
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.runs import assert_same_metrics, read_tensors, run_app, train, train_each
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.serving import Scorer
from torchrec_hilomoe.training.metrics import compute_metrics

ROWS, TESTED = 2000, 300
COLOURS = ["red", "green", "blue"]
DESCRIPTION: dict[str, Any] = {
    "dataset": "shop",
    "tables": {"user": 50, "age": 8},
    "candidate": [{"name": "item", "table": "item"}],
    "sequences": [
        {
            "name": "clicks",
            "fields": [
                {"name": "clicked", "table": "item"},
                {"name": "dwell", "table": "dwell"},
            ],
            "max_length": 4,
            "time": "clicked_at",
        }
    ],
    "pooled": [
        {"name": "user", "table": "user"},
        {"name": "age", "table": "age"},
        {"name": "colours", "table": "colour", "max_length": 3},
    ],
    "dense": ["price"],
    "label": "label",
    "group": "user",
    "time": "at",
    "vocabularies": {
        "item": {"kind": "counted", "min_count": 4},
        "user": {"kind": "hashed"},
        "colour": {"kind": "given", "file": "colours.txt", "unknown": "last"},
        "dwell": {"kind": "bucketed", "buckets": 6},
    },
}


def raw_rows(rows: int, seed: int) -> pa.Table:
    """Rows with rare items, and colours that no list has."""
    rng = np.random.default_rng(seed)

    def items(count: int) -> list[str]:
        return [f"i{it}" for it in rng.zipf(1.5, size=count) % 60]

    def seconds(count: int) -> list[float | None]:
        return [None if rng.random() < 0.1 else rng.lognormal() for _ in range(count)]

    lengths = rng.integers(0, 7, size=rows).tolist()
    return pa.table(
        {
            "item": pa.array(items(rows)).dictionary_encode(),
            "clicked": pa.array([items(n) for n in lengths], pa.list_(pa.string())),
            "dwell": pa.array([seconds(n) for n in lengths], pa.list_(pa.float32())),
            "clicked_at": pa.array([[1000] * n for n in lengths], pa.list_(pa.int64())),
            "user": [f"u{n}" for n in rng.integers(0, 200, size=rows)],
            "age": pa.array(rng.integers(0, 8, size=rows), pa.int8()),
            "colours": [
                rng.choice([*COLOURS, "odd"], size=n).tolist() for n in rng.integers(0, 5, rows)
            ],
            "price": rng.normal(size=rows),
            "label": pa.array(rng.random(rows) < 0.3),
            "at": rng.integers(2000, 3000, size=rows),
        }
    )


def run(name, argv):
    """Run an app, as it stands in a clone, in this process."""
    sys.argv = [f"apps/{name}.py", *map(str, argv)]
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "apps" / f"{name}.py"), run_name="__main__")
    return end.value.code


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with raw and prepared rows and a run whose experts have learned."""
    folder = tmp_path_factory.mktemp("shop")
    raw = folder / "raw"
    raw.mkdir()
    for split, rows, seed in (("train", ROWS, 1), ("valid", 200, 2), ("test", TESTED, 3)):
        pq.write_table(raw_rows(rows, seed), raw / f"{split}.parquet")
    (raw / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    (raw / "schema.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    prepare_parquet(raw=str(raw), schema=str(raw / "schema.yaml"), out=str(folder / "data"))
    options = [f"--data.path={folder / 'data'}", "--model.backbone=din"]
    options += ["--model.hilomoe.routing=sample", "--checkpoint.every_steps=5"]
    train(folder / "run", *options, "--model.hilomoe.route_by=[[item],[colours],[clicked]]")
    return folder


def test_raw_rows_score_as_evaluation_scores_what_was_prepared_of_them(shop, capsys):
    checkpoints = shop / "run" / "checkpoints"
    checkpoint, out = checkpoints / "step_18", shop / "model"
    (code,) = run_ranks(
        run, 1, "export", [checkpoint, "--out", out, "--split", "test"], joined=False
    )
    assert code == 0
    result = shop / "test.json"
    argv = [checkpoint, "--out", result, "--device", "cpu"]
    (code,) = run_ranks(run, 1, "evaluate", argv, joined=False)
    assert code == 0
    evaluated = json.loads(result.read_text())["metrics"]
    exported = json.loads((out / "manifest.json").read_text())["origin"]
    assert exported["step"] == 18
    assert exported["expert_layers"] == 3
    assert_same_metrics(exported["metrics"], evaluated, checkpoint)

    (shop / "copy").mkdir()
    raw = pq.read_table(shop / "raw" / "test.parquet")
    for name, table in {"one": raw.slice(0, 100), "two": raw.slice(100)}.items():
        pq.write_table(table.drop_columns(["label", "at", "clicked_at"]), shop / "copy" / name)
    files = [shop / "copy" / "one", shop / "copy" / "two"]
    assert run("score", [out, "--data", *files, "--out", shop / "scored"]) == 0
    assert list(json.loads(capsys.readouterr().out)["rows"].values()) == [100, TESTED - 100]
    parts = [pq.read_table(shop / "scored" / name)["probability"] for name in ("one", "two")]
    probabilities_N = np.concatenate(parts).astype(np.float64)
    logits_N = np.log(probabilities_N) - np.log1p(-probabilities_N)
    labels_N = raw["label"].to_numpy().astype(np.float64)
    metrics = compute_metrics(logits_N, labels_N, np.zeros(TESTED, dtype=np.int64))
    # Two rows that differ by less than rounding may change places.
    assert abs(metrics.auc - evaluated["auc"]) <= 1 / TESTED
    scorer = Scorer(str(out))
    ids = scorer.score(pq.read_table(shop / "data" / "test"), values="ids")
    assert np.array_equal(scorer.score(raw), ids)
    # The model would tell if numbers were put into other buckets.
    doubled = [[it and 2 * it for it in seconds] for seconds in raw["dwell"].to_pylist()]
    place = raw.column_names.index("dwell")
    assert not np.array_equal(scorer.score(raw.set_column(place, "dwell", [doubled])), ids)


def test_a_checkpoint_from_before_the_experts_is_refused_by_the_command(shop):
    out = shop / "early"
    argv = [shop / "run" / "checkpoints" / "step_5", "--out", out]
    (code,) = run_ranks(run, 1, "export", argv, joined=False)
    assert code == 2
    assert not out.exists()


@pytest.fixture(scope="module")
def teacher(shop):
    """An exported model, and the options of students that learn from it."""
    out = shop / "teacher"
    argv = [shop / "run" / "checkpoints" / "step_18", "--out", out]
    (code,) = run_ranks(run, 1, "export", argv, joined=False)
    assert code == 0
    return out


def student(shop, *options):
    """Options of a plain model of the same columns."""
    plain = [f"--data.path={shop / 'data'}", "--model.backbone=din", "--model.hilomoe=null"]
    return [*plain, "--checkpoint.every_steps=6", "--train.evaluate_every=6", *options]


def last_of(folder):
    return read_tensors(folder / "checkpoints" / "step_18")


def same(some, others):
    assert some.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@pytest.fixture(scope="module")
def taught(shop, teacher):
    """The run of a student in two processes."""
    soft = [f"--train.teacher={teacher}", "--train.teacher_weight=0.7"]
    options = student(shop, *soft, "--train.teacher_temperature=2")
    train(shop / "taught", *options, ranks=2)
    return options


@pytest.mark.slow
def test_a_student_learns_from_an_exported_model_and_goes_on_with_the_same_bits(shop, taught):
    summary = json.loads((shop / "taught" / "summary.json").read_text())
    assert (summary["teacher"]["backbone"], summary["teacher"]["step"]) == ("DIN", 18)

    half = "checkpoints/step_6"
    shutil.copytree(shop / "taught" / half, shop / "again" / half)
    train(shop / "again", *taught, ranks=2)
    assert same(last_of(shop / "again"), last_of(shop / "taught"))


@pytest.mark.slow
def test_a_teacher_has_no_say_without_weight_and_the_only_one_with_all_of_it(shop, teacher):
    """To the bit; the other rows are the same ones with every click turned round."""
    shutil.copytree(shop / "raw", shop / "turned")
    rows = pq.read_table(shop / "raw" / "train.parquet")
    clicks = pa.array(~rows["label"].to_numpy())
    place = rows.column_names.index("label")
    pq.write_table(rows.set_column(place, "label", clicks), shop / "turned" / "train.parquet")
    described = str(shop / "turned" / "schema.yaml")
    prepare_parquet(raw=str(shop / "turned"), schema=described, out=str(shop / "other"))

    def options(weight, data):
        soft = [f"--train.teacher={teacher}", f"--train.teacher_weight={weight}"]
        return student(shop, *soft, "--train.teacher_temperature=2", f"--data.path={shop / data}")

    train_each(
        {
            shop / "clicks": student(shop),
            shop / "unheard": options(0, "data"),
            shop / "heard": options(1, "data"),
            shop / "heard, other clicks": options(1, "other"),
            shop / "nearly, other clicks": options(0.99, "other"),
        }
    )
    assert same(last_of(shop / "unheard"), last_of(shop / "clicks"))
    assert same(last_of(shop / "heard, other clicks"), last_of(shop / "heard"))
    assert not same(last_of(shop / "nearly, other clicks"), last_of(shop / "heard"))


@pytest.mark.slow
def test_a_run_goes_on_with_no_other_teacher_than_its_own(shop, teacher, taught):
    """Gone, replaced by another one, and moved: only the last is no mistake."""
    half, folder = "checkpoints/step_6", shop / "half"
    shutil.copytree(shop / "taught" / half, folder / half)
    argv = [*taught, f"--out_dir={folder}"]
    moved = teacher.rename(shop / "moved")
    try:
        (ended,) = run_app(*argv)
        assert ended.code == 2
        assert ended.shown.splitlines()[-1] == (
            f"error: train.teacher: there is no artifact at {teacher} (manifest.json is missing). "
            "Name a folder that export has written."
        )
        other = [shop / "run" / "checkpoints" / "step_15", "--out", teacher]
        (code,) = run_ranks(run, 1, "export", other, joined=False)
        assert code == 0
        again = r"or begin another run with --init_from .*/step_6"
        other_model = (
            rf"another model than train\.teacher {teacher} is now: DIN of .*/step_18, .*, against "
            rf"DIN of .*/step_15, .*\. Name the former one, {again}"
        )
        no_model = (
            r"DIN of .*/step_18, and train\.teacher is null\. Name its folder, .*teacher_weight 0 "
            rf".* {again}"
        )
        for given, said in (((), other_model), (("--train.teacher=null",), no_model)):
            (ended,) = run_app(*argv, *given)
            assert ended.code == 2
            last = ended.shown.splitlines()[-1]
            assert re.fullmatch(rf"error: checkpoint .*/step_6 has learned from {said}", last)
        assert not (folder / "checkpoints" / "step_12").exists()
        train(folder, *taught, f"--train.teacher={moved}", ranks=2)
    finally:
        if teacher.exists():
            shutil.rmtree(teacher)
        moved.rename(teacher)
    assert same(last_of(folder), last_of(shop / "taught"))
