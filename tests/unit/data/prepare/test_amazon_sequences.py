"""Amazon sequences: rows against a slow definition, negatives, and what bad raw files get."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import load_schema, ParquetSource
from torchrec_hilomoe.data.prepare.amazon_sequences import prepare_amazon_sequences
from torchrec_hilomoe.data.schema import Schema

REAL = Path(__file__).parents[4].parent / "shared" / "data" / "amazon"
RECIPES = {"Beauty": "amazon-beauty", "Toys_and_Games": "amazon-toys"}
SPLITS = ("train", "valid", "test")
SEQUENCES = {
    7: [30, 10, 20, 40, 50],
    3: [10, 20],
    5: [20, 30, 10, 60, 70, 80, 90],
    9: [40],
    4: [90, 30, 40],
    6: [40, 80, 50, 60],
}
ATTRIBUTES = {item: [1, item % 3, 5 + item // 30] for item in range(10, 90, 10)}  # none for 90


def write_raw(folder, sequences, *, attributes=ATTRIBUTES, more="", zipped=False, name="Toy"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(str, (user, *items))) for user, items in sequences.items()]
    texts = {
        f"{name}.txt": "\n".join(lines) + "\n" + more,
        f"{name}_item2attributes.json": json.dumps(attributes),
    }
    for file, text in texts.items():
        if zipped:
            (folder / f"{file}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / file).write_text(text)
    return str(folder)


def rows_of(folder, split):
    return pq.read_table(folder / split).to_pylist()


def recipes_schema(name):
    text = files("torchrec_hilomoe").joinpath(f"recipes/schemas/{RECIPES[name]}.yaml").read_text()
    return Schema.from_dict(yaml.safe_load(text))


def ids_by_count(values):
    counts = Counter(values)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    return {value: 1 + rank for rank, value in enumerate(ranked)}


def expected_clicks(sequences, max_history):
    """The definition of the rows that are clicks: ``{split: [row]}``."""
    trained = [item for items in sequences.values() for item in items[:-2]]
    items_ids = ids_by_count(trained)
    category_of = {item: ATTRIBUTES[item][-1] if item in ATTRIBUTES else None for item in trained}
    category_ids = ids_by_count(category_of[item] for item in trained if category_of[item])
    known = {item: ATTRIBUTES.get(item, []) for item in trained}
    attribute_ids = ids_by_count(value for values in known.values() for value in values)

    def category(item):
        return category_ids.get(ATTRIBUTES.get(item, [None])[-1], 0)

    rows = {split: [] for split in SPLITS}
    for group, user in enumerate(sorted(sequences)):
        items = sequences[user]
        for at in range(1, len(items)):
            history = items[:at][-max_history:]
            split = {len(items) - 1: "test", len(items) - 2: "valid"}.get(at, "train")
            rows[split].append(
                {
                    "item": items_ids.get(items[at], 0),
                    "category": category(items[at]),
                    "history_item": [items_ids.get(item, 0) for item in history],
                    "history_category": [category(item) for item in history],
                    "attributes": [attribute_ids.get(a, 0) for a in ATTRIBUTES.get(items[at], [])],
                    "label": 1,
                    "user": group,
                }
            )
    return rows


@pytest.mark.parametrize("zipped", [False, True])
def test_clicks_are_the_definitions(tmp_path, zipped):
    raw = write_raw(tmp_path / "raw", SEQUENCES, zipped=zipped)
    out = tmp_path / "out"
    prepare_amazon_sequences(raw=raw, out=str(out), name="Toy", max_history=3)
    want = expected_clicks(SEQUENCES, max_history=3)
    for split in SPLITS:
        rows = rows_of(out, split)
        clicks = [row for row in rows if row["label"]]

        def place(row):
            return row["user"], row["history_item"]

        assert sorted(clicks, key=place) == sorted(want[split], key=place)
        context = ("user", "history_item", "history_category")
        negatives, positives = (
            Counter(str([row[name] for name in context]) for row in rows if row["label"] == label)
            for label in (0, 1)
        )
        assert negatives == positives


def test_negatives_are_uniform_over_what_the_user_never_bought(tmp_path):
    sequences = {user: [1, 2, 3, 4, 5, 6, 7] for user in range(300)} | {300: [8, 9, 10, 11] * 2}
    raw = write_raw(tmp_path / "raw", sequences, attributes={})
    counts = Counter()
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        prepare_amazon_sequences(raw=raw, out=str(out), name="Toy", seed=seed)
        ids = ids_by_count(item for items in sequences.values() for item in items[:-2])
        bought = {ids[item] for item in range(1, 6)}
        for row in rows_of(out, "train"):
            if not row["label"] and row["user"] < 300:
                assert row["item"] not in bought
                counts[row["item"]] += 1
    total = sum(counts.values())
    assert len(counts) == 4
    # Four equal chances: each count is within five of its standard deviations.
    assert all(abs(n - total / 4) < 5 * (total * 3 / 16) ** 0.5 for n in counts.values())


def test_negatives_are_items_that_training_rows_know(tmp_path):
    """Else id 0, of all unknown items, would be trained with label 0 alone."""
    late = {user: [user % 5, 5 + user % 3, 1000 + user, 2000 + user] for user in range(300)}
    raw = write_raw(tmp_path / "raw", late, attributes={})
    out = tmp_path / "out"
    prepare_amazon_sequences(raw=raw, out=str(out), name="Toy")
    for split in SPLITS:
        rows = rows_of(out, split)
        assert {row["item"] for row in rows if not row["label"]} == set(range(1, 9))
        clicked = {row["item"] for row in rows if row["label"]}
        assert (0 in clicked) == (split != "train")


def test_the_seed_decides_the_negatives(tmp_path):
    raw = write_raw(tmp_path / "raw", SEQUENCES)
    tests = []
    for place, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"out{place}"
        prepare_amazon_sequences(raw=raw, out=str(out), name="Toy", seed=seed)
        tests.append(rows_of(out, "test"))
    assert tests[0] == tests[1] != tests[2]


def test_malformed_lines_are_counted_and_skipped(tmp_path, caplog):
    raw = write_raw(tmp_path / "raw", SEQUENCES, more="8\nuser 1 2 3\n8 1  2\n")
    report = prepare_amazon_sequences(raw=raw, out=str(tmp_path / "out"), name="Toy")
    assert report.rows_bad == {"Toy.txt": 3}
    assert f"{raw}/Toy.txt line 7: malformed: '8'; skipped" in caplog.messages
    with pytest.raises(DataError, match=r"more than max_bad_rows 2 .*Toy\.txt line 9"):
        prepare_amazon_sequences(raw=raw, out=str(tmp_path / "two"), name="Toy", max_bad_rows=2)
    assert not (tmp_path / "two").exists()


def test_broken_raw_files_are_named(tmp_path):
    raw = write_raw(tmp_path / "raw", SEQUENCES)

    def prepare(name="Toy"):
        prepare_amazon_sequences(raw=raw, out=str(tmp_path / "out"), name=name)

    with pytest.raises(DataError, match=r"neither Toyz\.txt nor Toyz\.txt\.gz"):
        prepare(name="Toyz")
    attributes = tmp_path / "raw" / "Toy_item2attributes.json"
    for text, message in (
        ("{", r"attributes\.json cannot be read"),
        ("[1, 2]", r"is not item -> list of integers"),
        ('{"1": ["x"]}', r"is not item -> list of integers"),
    ):
        attributes.write_text(text)
        with pytest.raises(DataError, match=message):
            prepare()
    (tmp_path / "raw" / "Toy.txt").write_text("")
    with pytest.raises(DataError, match=r"Toy\.txt has no good line"):
        prepare()


def test_a_user_without_a_negative_is_an_error(tmp_path):
    raw = write_raw(tmp_path / "raw", {1: [10, 20, 30], 2: [10, 20], 3: [20, 10, 40, 50]})
    with pytest.raises(DataError, match=r"user 1 has bought all 2 items of the training rows"):
        prepare_amazon_sequences(raw=raw, out=str(tmp_path / "out"), name="Toy")
    write_raw(tmp_path / "raw", {1: [10, 20], 2: [20, 30]})
    with pytest.raises(DataError, match=r"none of its 4 rows would be trained on"):
        prepare_amazon_sequences(raw=raw, out=str(tmp_path / "out"), name="Toy")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_carry_the_columns_that_prepare_makes(tmp_path, name):
    """All but what the raw files decide: the tables' sizes and the most attributes of an item."""
    raw, out = write_raw(tmp_path / "raw", SEQUENCES, name=name), tmp_path / "out"
    prepare_amazon_sequences(raw=raw, out=str(out), name=name)
    recipe, made = recipes_schema(name), load_schema(str(out))
    (attributes,) = made.pooled
    attributes = replace(attributes, max_length=recipe.pooled[0].max_length)
    assert recipe.differences(replace(made, tables=recipe.tables, pooled=(attributes,))) == ()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs Amazon sequences at {REAL}")
@pytest.mark.parametrize("name", RECIPES)
def test_the_real_sets(tmp_path, name):
    out = tmp_path / "out"
    report = prepare_amazon_sequences(raw=str(REAL), out=str(out), name=name)
    lines = [line.split() for line in (REAL / f"{name}.txt").read_text().splitlines()]
    assert report.rows_read == len(lines)
    assert report.rows_kept == 2 * sum(len(line) - 2 for line in lines)
    assert report.splits["test"].rows == report.splits["valid"].rows == 2 * len(lines)
    assert {split.label_rate for split in report.splits.values()} == {0.5}
    assert recipes_schema(name).differences(load_schema(str(out))) == ()
    for split in SPLITS:
        loader = Loader(ParquetSource(str(out), split), batch_size=4096, epochs=1, max_bad_rows=0)
        assert sum(int(batch.weights.sum()) for batch in loader) == report.splits[split].rows
