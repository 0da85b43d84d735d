"""Anyone's Parquet: every kind of column and vocabulary, and splits."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.own_tables import DESCRIPTION, prepare, read, ROWS, table, TAGS, write_raw
from tests.helpers.raw_logs import write_vectors
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import load_schema, ParquetSource
from torchrec_hilomoe.data.prepare.check import check_prepared


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


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
        for event in row["clicked"][-4:]:  # what training reads
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
        "dwell": [it for row in trained for it in row["dwell"][-4:] if it is not None and it == it],
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


ZIPS = ["02139", "00501", "10001"]


def with_zip_codes(raw, codes, lines):
    """Give rows a zip code each, and its table a vocabulary of these lines."""
    for part in range(3):
        rows = table().slice(part * 100, 100)
        zips = pa.array([codes[place % len(codes)] for place in range(100)])
        pq.write_table(rows.append_column("zip", zips), raw / "train" / f"{part}.parquet")
    (raw / "zips.txt").write_text("\n".join(lines) + "\n")
    described = DESCRIPTION | {
        "pooled": [*DESCRIPTION["pooled"], {"name": "zip", "table": "zip"}],
        "vocabularies": DESCRIPTION["vocabularies"]
        | {"zip": {"kind": "given", "file": "zips.txt"}},
    }
    (raw / "schema.yaml").write_text(yaml.safe_dump(described))


def test_given_texts_keep_their_leading_zeros(raw, tmp_path):
    with_zip_codes(raw, ZIPS, ZIPS)
    report = prepare(raw, tmp_path / "out")
    vocabulary = pq.read_table(tmp_path / "out" / "vocabularies" / "zip.parquet")
    assert vocabulary.to_pydict() == {"value": ZIPS, "id": [1, 2, 3]}
    assert all(found["zip"]["unknown_ids"] == 0 for found in report.unknown.values())


def test_given_lines_are_numbers_where_columns_hold_numbers(raw, tmp_path):
    with_zip_codes(raw, [2139, 501, 10001], ZIPS)
    report = prepare(raw, tmp_path / "out")
    vocabulary = pq.read_table(tmp_path / "out" / "vocabularies" / "zip.parquet")
    assert vocabulary.to_pydict() == {"value": [2139, 501, 10001], "id": [1, 2, 3]}
    assert all(found["zip"]["unknown_ids"] == 0 for found in report.unknown.values())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.int64(), pa.string()),
        (pa.uint64(), pa.int64()),
        (pa.decimal128(20, 0), pa.int32()),
        (pa.float64(), pa.large_string()),
        (pa.int16(), pa.null()),
    ],
    ids=str,
)
def test_a_group_is_the_same_in_files_of_different_types(raw, tmp_path, first, second):
    users = pa.array([place % 40 for place in range(100)])
    for part, kind in enumerate((first, second, first)):
        rows = table().slice(part * 100, 100)
        if pa.types.is_decimal(kind):
            typed = users.cast(pa.decimal128(19, 0)).cast(kind)
        else:
            typed = pa.nulls(100) if pa.types.is_null(kind) else users.cast(kind)
        rows = rows.append_column("visitor", typed)
        pq.write_table(rows, raw / "train" / f"{part}.parquet")
    (raw / "schema.yaml").write_text(yaml.safe_dump(DESCRIPTION | {"group": "visitor"}))
    prepare(raw, tmp_path / "out", valid_by="group", valid_percent=20, test_percent=20)
    splits = [read(tmp_path / "out", split) for split in ("train", "valid", "test")]
    groups = [{row["visitor"] for row in rows} for rows in splits]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 40


def test_a_number_and_its_text_are_one_group(raw, tmp_path):
    """Hashes do not depend on which file held the text."""
    found = []
    for kinds in ((pa.int64(), pa.string(), pa.string()), (pa.string(),) * 3):
        for part, kind in enumerate(kinds):
            rows = table().slice(part * 100, 100)
            visitors = pa.array([place % 40 for place in range(100)]).cast(kind)
            rows = rows.append_column("visitor", visitors)
            pq.write_table(rows, raw / "train" / f"{part}.parquet")
        (raw / "schema.yaml").write_text(yaml.safe_dump(DESCRIPTION | {"group": "visitor"}))
        out = tmp_path / f"out{len(found)}"
        prepare(raw, out, valid_by="group", valid_percent=20, test_percent=20)
        found.append([read(out, split) for split in ("train", "valid", "test")])
    assert found[0] == found[1]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_without_rows_is_told_at_the_end(raw, tmp_path, caplog, split):
    prepare(raw, tmp_path / "whole")
    assert "a run" not in caplog.text
    prepare(raw, tmp_path / "out", **{f"{split}_percent": 0})
    assert f"no {split} rows, which a run needs: " in caplog.text
    assert f"prepare again with --{split}_percent above 0" in caplog.text


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("us", "Europe/Paris")], ids=str)
def test_times_with_fractions_of_a_second_are_those_without(raw, tmp_path, kind):
    whole = prepare(raw, tmp_path / "whole")
    fraction = {"ms": 999, "us": 999_999}[kind.unit]
    per_second = fraction + 1
    for path in sorted((raw / "train").iterdir()):
        found = pq.read_table(path)
        for name in ("at", "clicked_at"):
            lists = found[name].to_pylist()
            lists = [
                [t * per_second + fraction for t in row]
                if isinstance(row, list)
                else row * per_second + fraction
                for row in lists
            ]
            moments = pa.array(lists, pa.list_(kind) if name == "clicked_at" else kind)
            found = found.set_column(found.column_names.index(name), name, moments)
        pq.write_table(found, path)
    assert prepare(raw, tmp_path / "out").splits == whole.splits
    for split in ("train", "valid", "test"):
        assert read(tmp_path / "out", split) == read(tmp_path / "whole", split)


@pytest.mark.parametrize("kind", ["counted", "bucketed"])
def test_events_that_are_cut_off_in_every_use_count_for_nothing(raw, tmp_path, kind):
    """One raw column is cut to its last two entries and to its first one, for one table."""
    rows = table().append_column("seen", pa.array([[1, 2, 3, 4, 5], [6], [6, 7]] * (ROWS // 3)))
    for part in range(3):
        pq.write_table(rows.slice(part * 100, 100), raw / "train" / f"{part}.parquet")
    rule = {"kind": kind} | ({"buckets": 9} if kind == "bucketed" else {})
    described = DESCRIPTION | {
        "sequences": [
            *DESCRIPTION["sequences"],
            {
                "name": "seen",
                "max_length": 1,
                "keep": "first",
                "fields": [{"name": "first_seen", "table": "seen"}],
            },
        ],
        "pooled": [
            *DESCRIPTION["pooled"],
            {"name": "last_seen", "table": "seen", "max_length": 2},
        ],
        "vocabularies": DESCRIPTION["vocabularies"] | {"seen": rule},
        "columns": DESCRIPTION["columns"] | {"first_seen": "seen", "last_seen": "seen"},
    }
    (raw / "schema.yaml").write_text(yaml.safe_dump(described))
    report = prepare(raw, tmp_path / "out", valid_percent=0, test_percent=0)
    values = pq.read_table(tmp_path / "out" / "vocabularies" / "seen.parquet")["value"].to_pylist()
    # Each row's entries once: 6 twice as often as the others, whatever the uses.
    if kind == "counted":
        assert values == [6, 1, 4, 5, 7]
    else:
        assert values == [float("-inf"), 4, 5, 6, 7]
    assert report.unknown["train"]["seen"]["unknown_ids"] == 0
