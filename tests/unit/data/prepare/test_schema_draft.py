"""``schema init``: where each column goes and why, and that prepare takes what it wrote."""

import gzip
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.raw_logs import criteo_rows, write_csv
from tests.unit.data.prepare.test_command import ask as ask  # a fixture
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import load_schema
from torchrec_hilomoe.data.prepare.check import check_prepared
from torchrec_hilomoe.data.prepare.criteo import FIELDS, NUMBERS
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.data.prepare.schema_draft import draft_schema
from torchrec_hilomoe.data.prepare.seen_columns import read_columns

ROWS = 400
RNG = np.random.default_rng(0)


def ids(most: int, rows: int = ROWS) -> list[int]:
    return RNG.integers(0, most, rows).tolist()


def lists(most: int, lengths: list[int]) -> list[list[int]]:
    return [ids(most, length) for length in lengths]


def clicks() -> dict[str, Any]:
    """With every kind of column, in types of all kinds."""
    lengths = ids(7)
    return {
        "was_clicked": [bool(x) for x in ids(2)],
        "is_mobile": ids(2),
        "userId": [f"u{x}" for x in ids(60)],
        "item_id": ids(50),
        "category": [f"c{x}".encode() for x in ids(8)],
        "shown_at": [1_700_000_000 + x for x in ids(10**6)],
        "hour": ids(24),
        "price": RNG.random(ROWS).tolist(),
        "views_count": [None if x % 4 == 0 else x for x in ids(10**6)],
        "past_items": lists(50, lengths),
        "past_category": [[f"c{x}" for x in row] for row in lists(8, lengths)],
        "past_time": [[1_600_000_000 + x for x in row] for row in lists(1000, lengths)],
        "tags": lists(9, ids(4)),
        "fingerprint": pa.array([2**63 + x for x in ids(90)], pa.uint64()),
        "constant": ["same"] * ROWS,
        "request": [f"r{x}" for x in range(ROWS)],
        "loaded_ms": [1_700_000_000_000 + x for x in ids(10**6)],
        "vector": [[0.5, 0.5]] * ROWS,
        "nested": [{"a": 1}] * ROWS,
    }


def draft(folder: Path, table: pa.Table) -> tuple[str, dict[str, Any]]:
    """The text for a table, and what YAML reads of it."""
    (folder / "raw").mkdir()
    pq.write_table(table, folder / "raw" / "train.parquet")
    path = folder / "shop.yaml"
    text = draft_schema([str(folder / "raw" / "train.parquet")], out=str(path)).text
    assert path.read_text() == text
    return text, yaml.safe_load(text)


def test_numbers_that_go_with_a_history_are_put_into_buckets(tmp_path):
    """Of whole seconds, too; vectors of every row are left out."""
    columns = clicks()
    lengths = [len(row) for row in columns["past_items"]]
    columns["dwell_time"] = [RNG.random(length).tolist() for length in lengths]
    columns["past_duration"] = lists(10**6, lengths)
    columns["vector"] = RNG.random((ROWS, 4)).tolist()
    text, schema = draft(tmp_path, pa.table(columns))
    (history,) = schema["sequences"]
    assert history["time"] == "past_time"
    assert {"name": "dwell_time", "table": "dwell_time"} in history["fields"]
    for name in ("dwell_time", "past_duration"):
        assert schema["vocabularies"][name] == {"kind": "bucketed", "buckets": 32}
    assert "numbers from 0." in text
    assert "# - vector: up to 4 entries, numbers from" in text
    out = tmp_path / "out"
    prepare_parquet(
        raw=str(tmp_path / "raw"), schema=str(tmp_path / "shop.yaml"), out=str(out), fill_dense=0
    )
    assert check_prepared(str(out)).faults == ()
    assert load_schema(str(out)).tables["dwell_time"] == 33


def test_every_column_has_its_place_and_the_reason(tmp_path):
    text, schema = draft(tmp_path, pa.table(clicks()))
    assert {name: schema[name] for name in ("dataset", "label", "group", "time")} == {
        "dataset": "shop",
        "label": "was_clicked",
        "group": "userId",
        "time": "shown_at",
    }
    # The category is in events, too, so that it is the candidate's.
    assert schema["candidate"] == [
        {"name": "item_id", "table": "item"},
        {"name": "category", "table": "category"},
    ]
    (history,) = schema["sequences"]
    assert history == {
        "name": "past_items",
        "max_length": 6,
        "time": "past_time",
        "fields": [
            {"name": "past_items", "table": "item"},
            {"name": "past_category", "table": "category"},
        ],
    }
    assert [feature["name"] for feature in schema["pooled"]] == [
        "tags",
        "is_mobile",
        "userId",
        "hour",
        "fingerprint",
    ]
    assert schema["pooled"][0]["max_length"] == 3
    assert schema["dense"] == ["price", "views_count"]
    assert schema["vocabularies"]["fingerprint"] == {"kind": "hashed"}
    assert schema["vocabularies"]["item"] == {"kind": "counted"}
    reasons = (
        "# - constant: has the same value in every row",
        "# - request: every row has a value of its own",
        "# - loaded_ms: looks like milliseconds",
        "# - vector: has the same value in every row",
        "# - nested: its type struct<a: int64> is none",
        "are missing: prepare with --fill_dense 0",
        "100% of whose values are those of item_id",
    )
    for reason in reasons:
        assert reason in text


def test_prepare_takes_it_as_it_is(tmp_path):
    draft(tmp_path, pa.table(clicks()))
    prepare_parquet(
        raw=str(tmp_path / "raw"),
        schema=str(tmp_path / "shop.yaml"),
        out=str(tmp_path / "out"),
        fill_dense=0.0,
    )
    assert check_prepared(str(tmp_path / "out")).faults == ()
    assert load_schema(str(tmp_path / "out")).tables["item"] <= 51


def test_rows_without_user_time_or_history(tmp_path):
    """Criteo's: counts are numbers, texts are ids, and the one with the most values leads."""
    path = tmp_path / "clicks.csv"
    write_csv(path, criteo_rows(300))
    found = draft_schema([str(path)], out=str(tmp_path / "criteo.yaml"))
    schema = yaml.safe_load(found.text)
    assert schema["label"] == "label"
    assert set(schema["dense"]) == set(NUMBERS)
    (item,) = (feature["name"] for feature in schema["candidate"])
    assert {item, *(feature["name"] for feature in schema["pooled"])} == set(FIELDS)
    assert schema["group"] == item
    assert not {"time", "sequences"} & schema.keys()
    assert "train --config dlrm-parquet" in found.hint
    assert "pl.scan_csv" in found.hint
    assert "--fill_dense 0" in found.hint


def test_a_compressed_csv_of_dates_and_lists_in_text(tmp_path):
    rows = [
        {"clicked": k % 3 == 0, "day": f"2026-01-{1 + k % 28:02d}", "ad": f"a{k % 7}", "seen": s}
        for k, s in enumerate(["a1|a2", "a3", "a1|a6|a2", None] * 30)
    ]
    lines = ["clicked,day,ad,seen"] + [
        ",".join("" if v is None else str(int(v) if isinstance(v, bool) else v) for v in r.values())
        for r in rows
    ]
    path = tmp_path / "clicks.csv.gz"
    path.write_bytes(gzip.compress(("\ufeff" + "\n".join(lines) + "\n").encode()))
    found = draft_schema([str(path)], out=str(tmp_path / "ads.yaml"))
    schema = yaml.safe_load(found.text)
    assert (schema["label"], schema["time"]) == ("clicked", "day")
    assert schema["sequences"][0]["fields"] == [{"name": "seen", "table": "ad"}]
    assert schema["sequences"][0]["max_length"] == 3
    _, convert, prepare, train = found.hint.splitlines()
    # What the hint says leads to a folder that is whole, whose events have the candidate's ids.
    exec(convert.partition('"')[2].rstrip('"').replace("RAW", str(tmp_path / "raw")), {})
    assert prepare.endswith("--separator '|'")
    out = str(tmp_path / "out")
    schema_file = str(tmp_path / "ads.yaml")
    prepare_parquet(raw=str(tmp_path / "raw"), schema=schema_file, out=out, separator="|")
    assert check_prepared(out).faults == ()
    assert load_schema(out).tables == {"ad": 8}
    assert "--config" not in train


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"rating": [1, 2, 3, 4]}, "no column holds 0 and 1; make one"),
        ({"liked": [0, 1, 1, 0], "shared": [1, 0, 0, 0]}, "liked, shared hold 0 and 1; name the"),
    ],
)
def test_a_label_that_cannot_be_told_is_asked_for(tmp_path, labels, reason):
    text, schema = draft(tmp_path, pa.table({"item": ["a", "b", "a", "c"], **labels}))
    assert schema["label"] == "label"
    assert f"# NOT FOUND: {reason}" in text


NAMES = ["on", "a: b", "x\ny", "# no", "tables", "forward", "名", " ", "😀 id", "a\x7f", "a\u2028b"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_column_harms_the_file(tmp_path, name):
    table = pa.table(
        {"click": [0, 1, 0, 1], name: ["a", "b", "a", "c"], "left out " + name: [1] * 4}
    )
    _, schema = draft(tmp_path, table)
    assert schema["candidate"][0]["name"] == name
    assert "forward" not in schema["vocabularies"]


def test_the_reason_does_not_become_part_of_a_long_name(tmp_path):
    long = "price_of_the_item_when_it_was_shown_last"
    click, prices = [0, 1, 0, 1], [0.5, 1.5, 2.5, 3.5]
    _, schema = draft(tmp_path, pa.table({"click": click, "item": list("abac"), long: prices}))
    assert schema["dense"] == [long]


def test_lists_of_another_separator_than_most_are_left_out(tmp_path):
    lists = {"seen": "a|b", "tags": "x^y", "places": "p|q"}
    rows = {"click": [0, 1] * 40, "item": ["a", "b"] * 40}
    rows |= {name: [text, text[0]] + [text] * 78 for name, text in lists.items()}
    folder = tmp_path / "my data"
    folder.mkdir()
    pq.write_table(pa.table(rows), folder / "train.parquet")
    file = str(tmp_path / "my shop.yaml")
    found = draft_schema([str(folder / "train.parquet")], out=file)
    reason = (
        "# - tags: its entries are separated by '^', but preparing takes one separator, and '|' "
    )
    assert reason + "is that of most lists" in found.text
    _, prepare, _ = found.hint.splitlines()
    words = shlex.split(prepare)
    options = dict(zip(words[5::2], words[6::2], strict=True))
    wanted = {"--raw": str(folder), "--schema": file, "--out": "DIR", "--separator": "|"}
    assert options == wanted
    assert prepare.count("--separator") == 1
    out = str(tmp_path / "out")
    prepare_parquet(raw=str(folder), schema=file, out=out, separator="|")
    assert check_prepared(out).faults == ()
    assert load_schema(out).tables["places"] == 3


def test_parts_of_one_table_are_looked_at_together(tmp_path):
    parts = [str(tmp_path / f"{part}.parquet") for part in "ab"]
    for path, item in zip(parts, "ab", strict=True):
        pl.DataFrame({"click": [0, 1], "item": [item, "c"]}).write_parquet(path)
    text = draft_schema(parts, out=str(tmp_path / "one.yaml"), rows=4).text
    assert "from 4 rows of" in text
    assert "its name says an item; 3 values" in text
    pl.DataFrame({"click": [0, 1], "items": ["b", "c"]}).write_parquet(parts[1])
    with pytest.raises(DataError, match=r"a\.parquet and .*b\.parquet differ in item, items"):
        draft_schema(parts, out=str(tmp_path / "other.yaml"))


ALIKE: list[tuple[pa.Array, pa.Array, pl.DataType | None, str]] = [
    (pa.array([True, False]), pa.array([1, 0], pa.int8()), pl.Int64(), "integer"),
    (pa.array([1, 2]), pa.array([0.5, None]), pl.Float64(), "number"),
    (pa.array([1, None]), pa.nulls(2), pl.Int64(), "integer"),
    (pa.array(["a", "b"]), pa.nulls(2), pl.String(), "text"),
    (pa.array([[1], [2, 3]]), pa.nulls(2), pl.List(pl.Int64), "integer"),
    (pa.array([[1], [2, 3]]), pa.array([[], None], pa.list_(pa.null())), None, "integer"),
    (pa.array([[0.5], []]), pa.array([[], []], pa.list_(pa.null())), None, "number"),
    (pa.array([[1], []]), pa.array([[0.5], []]), pl.List(pl.Float64), "number"),
    (pa.array([[True], []]), pa.array([[3], []]), pl.List(pl.Int64), "integer"),
    (pa.array([7, 8], pa.uint64()), pa.array([7, -8]), pl.String(), "fingerprint"),
    (pa.array([1, 2], pa.timestamp("us")), pa.array([1, 2], pa.date32()), None, "moment"),
    (pa.array([{"a": 1}] * 2), pa.nulls(2), pl.Null(), "unreadable"),
    (pa.array([[[1]], []]), pa.array([[], []], pa.list_(pa.null())), pl.Null(), "unreadable"),
    (pa.nulls(2), pa.nulls(2), pl.String(), "text"),
]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1, 0, 0), (0, 1, 1, 0)])
@pytest.mark.parametrize(("one", "other", "dtype", "kind"), ALIKE)
def test_types_that_prepare_reads_alike_are_of_one_table(tmp_path, one, other, dtype, kind, order):
    paths = [str(tmp_path / f"{number}.parquet") for number in range(len(order))]
    for path, which in zip(paths, order, strict=True):
        pq.write_table(pa.table({"x": (one, other)[which]}), path)
    (column,) = read_columns(paths, 100)
    assert (column.kind, len(column.values)) == (kind, 2 * len(order))
    assert dtype is None or column.values.dtype == dtype
    stored = {str(pq.read_schema(path).field("x").type) for path in paths}
    assert set(column.stored.split(" and ")) == stored


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["a"])),
        (pa.array([1]), pa.array([[1]])),
        (pa.array([[1]]), pa.array([["a"]])),
        (pa.array([1]), pa.array([[]], pa.list_(pa.null()))),
        (pa.array([1]), pa.array([1], pa.timestamp("us"))),
        (pa.array([0.5]), pa.array([7], pa.uint64())),
    ],
)
def test_types_that_prepare_reads_apart_are_refused(tmp_path, one, other):
    """Also where a file without a value of that column stands first."""
    columns = {"0": pa.nulls(1), "1": one, "2": other}
    for name, values in columns.items():
        pq.write_table(pa.table({"x": values}), tmp_path / f"{name}.parquet")
    for names in ("012", "021", "12", "120"):
        paths = [str(tmp_path / f"{name}.parquet") for name in names]
        with pytest.raises(DataError, match=r"[12]\.parquet and .*[12]\.parquet differ in x; name"):
            read_columns(paths, 100)


def test_a_csv_without_a_value_of_a_column_is_of_the_same_table(tmp_path):
    (tmp_path / "a.csv").write_text("click,item,at,on\n1,,2020-01-02,2020-01-02\n")
    (tmp_path / "b.csv").write_text("click,item,at,on\n0,7,2020-01-02T03:04:05Z,\n")
    columns = read_columns([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], 100)
    assert [c.kind for c in columns] == ["integer", "integer", "moment", "moment"]


def test_a_label_may_be_truth_values_in_one_file_and_numbers_in_another(tmp_path):
    (tmp_path / "train").mkdir()
    whole = pa.table(clicks()).slice(0, ROWS // 2)
    paths = [str(tmp_path / "train" / f"{part}.parquet") for part in "ab"]
    pq.write_table(whole, paths[0])
    at = whole.column_names.index("was_clicked")
    label = whole["was_clicked"].cast(pa.int32())
    other = whole.set_column(at, "was_clicked", label).drop_columns("past_items")
    empty = pa.array([[]] * len(other), pa.list_(pa.null()))
    for name in ("past_category", "past_time"):
        other = other.set_column(other.column_names.index(name), name, empty)
    pq.write_table(other.append_column("past_items", empty), paths[1])
    path = tmp_path / "s.yaml"
    text = draft_schema(paths, out=str(path)).text
    assert yaml.safe_load(text)["label"] == "was_clicked"
    report = prepare_parquet(
        raw=str(tmp_path), schema=str(path), out=str(tmp_path / "out"), fill_dense=0.0
    )
    assert report.rows_bad == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", r"a\.json is neither \.parquet nor \.csv"),
        ("a.csv", "click,item\n", r"a\.csv has no rows"),
        ("a.csv", "", r"a\.csv cannot be read as CSV"),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", "click,price\n0,1.5\n1,2.5\n", r"no column of .*a\.csv is one of ids"),
    ],
)
def test_what_no_schema_can_be_guessed_from_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        draft_schema([str(tmp_path / name)], out=str(tmp_path / "s.yaml"))
    assert not (tmp_path / "s.yaml").exists()


def test_the_command_writes_once_and_says_what_is_next(tmp_path, ask):
    pq.write_table(pa.table({"click": [0, 1], "item": ["a", "b"]}), tmp_path / "train.parquet")
    argv = ("schema", "init", str(tmp_path / "train.parquet"), "--out", str(tmp_path / "s.yaml"))
    code, shown, told = ask(*argv)
    assert (code, told) == (0, "")
    assert f"prepare parquet --raw {tmp_path} --schema {tmp_path}/s.yaml --out DIR" in shown
    code, shown, told = ask(*argv)
    assert (code, shown) == (2, "")
    assert (
        told
        == f"error: --out {tmp_path}/s.yaml is there already; remove it, or name another file.\n"
    )
    code, _, told = ask("schema", "int")
    assert (code, "Did you mean 'schema init'?" in told) == (2, True)
