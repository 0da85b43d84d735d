"""Anyone's Parquet: every kind of column and vocabulary, splits, and mistakes by their message."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.raw_logs import write_vectors
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import load_schema, ParquetSource
from torchrec_hilomoe.data.prepare.check import check_prepared
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet

ROWS = 300
DESCRIPTION: dict[str, Any] = {
    "dataset": "shop",
    "tables": {"user": 50, "age": 8},
    "candidate": [{"name": "item", "table": "item"}, {"name": "cover", "table": "cover"}],
    "sequences": [
        {
            "name": "clicks",
            "fields": [
                {"name": "clicked", "table": "item"},
                {"name": "clicked_cover", "table": "cover"},
            ],
            "max_length": 4,
            "time": "clicked_at",
        }
    ],
    "pooled": [
        {"name": "user", "table": "user"},
        {"name": "age", "table": "age"},
        {"name": "tags", "table": "tag", "max_length": 3},
    ],
    "dense": ["price"],
    "label": "label",
    "group": "user",
    "time": "at",
    "weight": "weight",
    "frozen": {"cover": {"width": 8, "file": "covers.h5"}},
    "vocabularies": {
        "item": {"kind": "counted", "min_count": 4},
        "user": {"kind": "hashed"},
        "tag": {"kind": "given", "file": "tags.txt", "unknown": "last"},
        "cover": {"kind": "given", "unknown": "last"},
    },
    "columns": {"cover": "item_number", "clicked_cover": "clicked_numbers"},
}
TAGS = ["red", "green", "blue"]


def table(rows: int = ROWS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    numbers = (rng.zipf(1.5, size=rows) % 40).tolist()
    clicked = [(rng.zipf(1.5, size=n) % 40).tolist() for n in rng.integers(0, 7, size=rows)]
    at = (10_000 + rng.permutation(rows)).tolist()
    return pa.table(
        {
            "item": pa.array([f"i{n}" for n in numbers]).dictionary_encode(),
            "item_number": pa.array(numbers, pa.int32()),
            "clicked": [[f"i{n}" for n in ids] for ids in clicked],
            "clicked_numbers": pa.array(clicked, pa.list_(pa.int16())),
            "clicked_at": [
                [t - 5 + k for k in range(len(ids))] for t, ids in zip(at, clicked, strict=True)
            ],
            "user": [f"u{n}" for n in rng.integers(0, 9, size=rows)],
            "age": pa.array(rng.integers(0, 8, size=rows), pa.int8()),
            "tags": [
                "^".join(rng.choice([*TAGS, "odd"], size=n)) for n in rng.integers(0, 5, rows)
            ],
            "price": rng.normal(size=rows),
            "label": pa.array(rng.random(rows) < 0.3),
            "at": at,
            "weight": rng.random(rows),
        }
    )


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    (folder / "train").mkdir(parents=True)
    whole = table()
    for part in range(3):
        pq.write_table(whole.slice(part * 100, 100), folder / "train" / f"{part}.parquet")
    (folder / "tags.txt").write_text("\n".join(TAGS) + "\n")
    write_vectors(folder / "covers.h5", range(40))
    (folder / "schema.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    return folder


def prepare(raw, out, **options):
    settings = {"raw": str(raw), "schema": str(raw / "schema.yaml"), **options}
    return prepare_parquet(out=str(out), **settings)


def read(out, split):
    return pq.read_table(out / split).to_pylist()


def test_every_kind_of_column_is_encoded(raw, tmp_path):
    out = tmp_path / "out"
    report = prepare(raw, out, valid_percent=10, test_percent=20)
    schema = load_schema(str(out))
    source = table().to_pylist()
    counts = {
        column: dict.fromkeys((f"i{n}" for n in range(40)), 0) for column in ("item", "clicked")
    }
    for row in source:
        if row["at"] >= 10_000 + 210:
            continue  # held out
        counts["item"][row["item"]] += 1
        for event in row["clicked"]:
            counts["clicked"][event] += 1
    known = {name for name in counts["item"] if max(c[name] for c in counts.values()) >= 4}
    vocabulary = pq.read_table(out / "vocabularies" / "item.parquet").to_pylist()
    ids = {row["value"]: row["id"] for row in vocabulary}
    assert set(ids) == known
    assert sorted(ids.values()) == list(range(1, len(known) + 1))
    frequency = [
        sum(c[row["value"]] for c in counts.values() if c[row["value"]] >= 4) for row in vocabulary
    ]
    assert frequency == sorted(frequency, reverse=True)
    assert schema.tables == {
        "item": len(known) + 1,
        "tag": 5,
        "cover": 42,
        "user": 50,
        "age": 8,
    }
    users = dict(
        zip(
            [row["user"] for row in source],
            hash_ids(pa.array([row["user"] for row in source]), 50).tolist(),
            strict=True,
        )
    )
    rows = {row["at"]: row for split in ("train", "valid", "test") for row in read(out, split)}
    groups: dict[str, set[int]] = {}
    for want in source:
        got = rows.pop(want["at"])
        assert got["item"] == ids.get(want["item"], 0)
        assert got["clicked"] == [ids.get(event, 0) for event in want["clicked"]][-4:]
        assert got["cover"] == want["item_number"] + 1
        assert got["clicked_cover"] == [n + 1 for n in want["clicked_numbers"]][-4:]
        assert got["clicked_at"] == want["clicked_at"][-4:]
        assert (got["user"], got["age"]) == (users[want["user"]], want["age"])
        tags = [tag for tag in want["tags"].split("^") if tag]
        assert got["tags"] == [TAGS.index(t) + 1 if t in TAGS else 4 for t in tags][-3:]
        assert got["price"] == np.float32(want["price"])
        assert got["weight"] == np.float32(want["weight"])
        assert got["label"] == want["label"]
        groups.setdefault(want["user"], set()).add(got["user_group"])
    assert not rows
    assert all(len(found) == 1 for found in groups.values())
    assert len(set.union(*groups.values())) == len(groups)
    times = {split: [row["at"] for row in read(out, split)] for split in ("train", "valid", "test")}
    assert max(times["train"]) < min(times["valid"]) <= max(times["valid"]) < min(times["test"])
    assert [len(times[split]) for split in times] == [210, 30, 60]
    assert report.splits["test"].rows == 60
    assert schema.frozen["cover"].file == "vectors/cover.npy"
    assert (out / "vectors" / "cover.npy").exists()
    batch = next(iter(Loader(ParquetSource(str(out), "train"), batch_size=16, prefetch=0)))
    assert batch.time is not None
    assert len(batch.times) == 1
    assert batch.weights.min() >= 0


@pytest.mark.parametrize(
    ("by", "splits"),
    [("rows", None), ("group", None), ("tail", [240, 30, 30]), ("time", [240, 30, 30])],
)
def test_rows_are_held_out_as_asked_whatever_the_threads(raw, tmp_path, by, splits):
    found = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        report = prepare(
            raw, out, valid_percent=10, test_percent=10, valid_by=by, workers=workers, seed=5
        )
        found.append({split: read(out, split) for split in ("train", "valid", "test")})
        assert report.options["held_out_by"] == by
    assert found[0] == found[1]
    sizes = [len(rows) for rows in found[0].values()]
    assert sum(sizes) == ROWS
    if splits:
        assert sizes == splits
    if by == "tail":
        last = table().slice(270).to_pylist()
        assert [row["at"] for row in found[0]["test"]] == [row["at"] for row in last]
    if by == "group":
        groups = [{row["user_group"] for row in rows} for rows in found[0].values()]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]


def test_files_of_their_own_are_not_touched(raw, tmp_path):
    pq.write_table(table(40, seed=1), raw / "valid.parquet")
    pq.write_table(table(50, seed=2), raw / "test.parquet")
    report = prepare(raw, tmp_path / "out")
    assert [split.rows for split in report.splits.values()] == [ROWS, 40, 50]
    ordered = [row["at"] for row in read(tmp_path / "out", "valid")]
    assert ordered == table(40, seed=1)["at"].to_pylist()


def with_dwell_times(folder, *, kind=None):
    """Give events a number each, and rows one; the raw rows, as Python has them."""
    rng = np.random.default_rng(3)
    numbers = [None, float("nan"), -0.5, 7.0]
    rows = [
        row
        | {
            "dwell": [
                numbers[rng.integers(4)] if rng.random() < 0.2 else float(rng.lognormal())
                for _ in row["clicked"]
            ],
            "spent": None if rng.random() < 0.1 else float(rng.normal()),
        }
        for row in table().to_pylist()
    ]
    whole = pa.Table.from_pylist(rows)
    if kind is not None:
        whole = whole.set_column(
            whole.column_names.index("dwell"), "dwell", whole["dwell"].cast(kind)
        )
    for part in range(3):
        pq.write_table(whole.slice(part * 100, 100), folder / "train" / f"{part}.parquet")
    (group,) = DESCRIPTION["sequences"]
    fields = [*group["fields"], {"name": "dwell", "table": "dwell"}]
    described = DESCRIPTION | {
        "sequences": [group | {"fields": fields}],
        "pooled": [*DESCRIPTION["pooled"], {"name": "spent", "table": "spent"}],
        "vocabularies": DESCRIPTION["vocabularies"]
        | {
            "dwell": {"kind": "bucketed", "buckets": 5},
            "spent": {"kind": "bucketed", "buckets": 3, "unknown": "last"},
        },
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(described))
    return rows


def bucket_of(number, least):
    """The place of the last bucket that begins at or below a number, from 1 on."""
    return sum(start <= number for start in least)


def test_numbers_along_a_history_become_buckets_of_training_rows(raw, tmp_path):
    source = with_dwell_times(raw)
    out = tmp_path / "out"
    report = prepare(raw, out, valid_percent=10, test_percent=20)
    assert check_prepared(str(out)).faults == ()
    trained = [row for row in source if row["at"] < 10_210]
    kept = {
        "dwell": [it for row in trained for it in row["dwell"] if it is not None and it == it],
        "spent": [row["spent"] for row in trained if row["spent"] is not None],
    }
    least = {}
    for name, count in (("dwell", 5), ("spent", 3)):
        ranked = sorted(kept[name])
        starts = sorted({ranked[part * len(ranked) // count] for part in range(1, count)})
        found = pq.read_table(out / "vocabularies" / f"{name}.parquet").to_pydict()
        least[name] = [float("-inf"), *starts]
        assert found == {"value": least[name], "id": list(range(1, count + 1))}
    schema = load_schema(str(out))
    assert (schema.tables["dwell"], schema.tables["spent"]) == (6, 5)
    rows = {row["at"]: row for split in ("train", "valid", "test") for row in read(out, split)}
    for want in source:
        got = rows.pop(want["at"])
        ids = [
            0 if it is None or it != it else bucket_of(it, least["dwell"]) for it in want["dwell"]
        ]
        assert got["dwell"] == ids[-4:]
        spent = want["spent"]
        assert got["spent"] == (4 if spent is None else bucket_of(spent, least["spent"]))
    unknown = sum(row["spent"] is None for row in trained)
    assert report.unknown["train"]["spent"]["unknown_ids"] == unknown > 0


def test_numbers_in_a_text_are_read_and_others_are_bad(raw, tmp_path, caplog):
    source = with_dwell_times(raw)
    for row in source:
        row["dwell"] = "^".join("1e1" for _ in row["dwell"])
    source[7] |= {"clicked": ["i1"], "clicked_numbers": [1], "clicked_at": [1], "dwell": "long"}
    pq.write_table(pa.Table.from_pylist(source), raw / "train" / "0.parquet")
    (raw / "train" / "1.parquet").unlink()
    (raw / "train" / "2.parquet").unlink()
    report = prepare(raw, tmp_path / "out")
    assert report.rows_bad == {"0.parquet": 1}
    assert "0.parquet row 7: malformed: 'dwell has an entry that is no number'" in caplog.text
    rows = [row for split in ("train", "valid", "test") for row in read(tmp_path / "out", split)]
    assert {id_ for row in rows for id_ in row["dwell"]} == {1}


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float16())], ids=str)
def test_a_history_of_numbers_says_what_would_do(raw, tmp_path, kind):
    with_dwell_times(raw, kind=kind)
    described = yaml.safe_load((raw / "schema.yaml").read_text())
    described["vocabularies"]["dwell"] = {"kind": "counted"}
    (raw / "other.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(DataError, match=r"'dwell' is .*; or give its table a bucketed"):
        prepare(raw, tmp_path / "out", schema=str(raw / "other.yaml"))
    assert prepare(raw, tmp_path / "out").rows_kept == ROWS


def spoil(column: str, row: int, value: object) -> pa.Table:
    rows = table(100).to_pylist()
    rows[row][column] = value
    kind = table(100).schema
    if column == "item":
        kind = kind.set(kind.get_field_index("item"), pa.field("item", pa.string()))
    return pa.Table.from_pylist(rows, schema=kind)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("label", None, "label is no finite number"),
        ("age", 8, "age has an id outside its table's 0 to 7"),
        ("age", -1, "age has an id outside its table's 0 to 7"),
        ("price", float("nan"), "price is no finite number"),
        ("price", None, "price is missing; --fill_dense NUMBER gives missing ones a value"),
        ("weight", -1.0, "weight is below 0"),
        ("at", None, "at is no whole number"),
        ("clicked_at", [1] * 9, "clicked and clicked_at have unequal numbers of events"),
        ("clicked", ["i1", None], "clicked has an entry that is no text"),
        ("user", None, "user is missing"),
    ],
)
def test_bad_rows_are_reported_and_skipped(raw, tmp_path, caplog, column, value, reason):
    pq.write_table(spoil(column, 17, value), raw / "train" / "1.parquet")
    report = prepare(raw, tmp_path / "out")
    assert f"{raw}/train/1.parquet row 17: malformed: '{reason}'" in caplog.text.replace('"', "'")
    assert report.rows_bad == {"1.parquet": 1}
    assert (report.rows_read, report.rows_kept) == (ROWS, ROWS - 1)
    with pytest.raises(DataError, match=r"more than max_bad_rows 0 .*1\.parquet row 17"):
        prepare(raw, tmp_path / "other", max_bad_rows=0)
    assert not (tmp_path / "other").exists()


def test_a_missing_number_may_be_filled(raw, tmp_path):
    pq.write_table(spoil("price", 3, None), raw / "train" / "0.parquet")
    report = prepare(raw, tmp_path / "out", fill_dense=-2.0)
    assert report.rows_kept == ROWS
    rows = [row for split in ("train", "valid", "test") for row in read(tmp_path / "out", split)]
    assert [row["price"] for row in rows].count(-2.0) == 1
    assert report.options["fill_dense"] == -2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lable": "label"}, r"schema\.yaml is not a schema: Schema has no 'lable'.*'label'"),
        ({"candidate": []}, r"is not a schema: Schema\.candidate is empty"),
        (
            {"columns": {**DESCRIPTION["columns"], "item": "itm"}},
            r"0\.parquet lacks the columns itm; it has item, ",
        ),
        ({"tables": {"user": 50}}, r"feature 'age' wants table 'age'"),
        (
            {"vocabularies": {"user": {"kind": "hashed"}}, "tables": {"tag": 9, "cover": 42}},
            r"feature 'item' wants table 'item'",
        ),
        ({"frozen": {"cover": {"width": 16, "file": "covers.h5"}}}, r"vectors of width 8.*says 16"),
        (
            {"vocabularies": {**DESCRIPTION["vocabularies"], "tag": {"kind": "given"}}},
            r"vocabulary of table 'tag' is given, but names no file",
        ),
        (
            {"columns": {"cover": "item_number", "clicked_cover": "clicked"}},
            r"table 'cover' is indexed by clicked, which holds texts, and by item_number",
        ),
        (
            {
                "tables": {**DESCRIPTION["tables"], "item": 9},
                "vocabularies": {
                    name: rule
                    for name, rule in DESCRIPTION["vocabularies"].items()
                    if name != "item"
                },
            },
            r"column \w+ holds texts, but table 'item' has no vocabulary",
        ),
        *(
            (
                {"vocabularies": {**DESCRIPTION["vocabularies"], "colour": rule}},
                r"is not a schema: vocabularies names table 'colour', which no feature has",
            )
            for rule in ({"kind": "counted"}, {"kind": "bucketed", "buckets": 3})
        ),
        *(
            (
                {
                    "tables": {**DESCRIPTION["tables"], "cover": 50},
                    "vocabularies": {
                        table: rule
                        for table, rule in (DESCRIPTION["vocabularies"] | {"cover": rule}).items()
                        if rule is not None
                    },
                },
                r"covers\.h5 has its vectors in another order than table 'cover' has ids",
            )
            for rule in (
                {"kind": "counted"},
                {"kind": "bucketed", "buckets": 3},
                {"kind": "hashed"},
                {"kind": "given", "file": "numbers.txt"},
                None,
            )
        ),
    ],
)
def test_mistakes_in_the_description_are_named(raw, tmp_path, change, message):
    (raw / "schema.yaml").write_text(json.dumps({**DESCRIPTION, **change}))
    (raw / "numbers.txt").write_text("\n".join(map(str, [*range(1, 40), 0])))
    with pytest.raises(ValueError, match=message):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "rule"),
    [(range(1, 8), None), (range(40), {"kind": "given", "file": "numbers.txt"})],
    ids=["ids", "given"],
)
def test_vectors_may_have_the_order_of_other_ids(raw, tmp_path, keys, rule):
    write_vectors(raw / "covers.h5", keys)
    (raw / "numbers.txt").write_text("\n".join(map(str, range(45))))
    described = DESCRIPTION | {"tables": {**DESCRIPTION["tables"], "cover": 40}}
    rules = DESCRIPTION["vocabularies"] | {"cover": rule}
    described["vocabularies"] = {table: it for table, it in rules.items() if it is not None}
    (raw / "schema.yaml").write_text(json.dumps(described))
    prepare(raw, tmp_path / "out")
    vectors = np.load(tmp_path / "out" / "vectors" / "cover.npy")
    assert check_prepared(str(tmp_path / "out")).faults == ()
    assert vectors[1 : 1 + len(keys)].any(axis=1).all()
    assert not vectors[1 + len(keys) :].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": "nowhere.yaml"}, r"no schema file nowhere\.yaml"),
        ({"raw": "nowhere"}, r"nowhere has neither a folder train with \.parquet files nor"),
        ({"valid_percent": 60}, r"--valid_percent must be from 0 to 45, got 60"),
        ({"workers": 0}, r"--workers must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(raw, tmp_path, options, message):
    given: dict[str, Any] = {
        "raw": str(raw),
        "schema": str(raw / "schema.yaml"),
        "out": str(tmp_path),
    }
    given |= options
    with pytest.raises(ValueError, match=message):
        prepare_parquet(**given)


def test_time_is_needed_to_split_by_it(raw, tmp_path):
    timeless = {name: value for name, value in DESCRIPTION.items() if name != "time"}
    (raw / "schema.yaml").write_text(yaml.safe_dump(timeless))
    with pytest.raises(ValueError, match="--valid_by is 'time', but the schema names no time"):
        prepare(raw, tmp_path / "out", valid_by="time")
    assert prepare(raw, tmp_path / "out").options["held_out_by"] == "rows"
