"""What people bring: odd types, encodings, folders and names; each read, or refused in one line."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import hash_ids
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet

ROWS = 60
SCHEMA: dict[str, Any] = {
    "dataset": "shop",
    "candidate": [{"name": "item", "table": "item"}],
    "sequences": [
        {
            "name": "clicks",
            "fields": [{"name": "clicked", "table": "item"}],
            "max_length": 5,
            "time": "clicked_at",
        }
    ],
    "pooled": [
        {"name": "tag", "table": "tag"},
        {"name": "words", "table": "word", "max_length": 4},
    ],
    "dense": ["price"],
    "group": "user",
    "time": "at",
    "vocabularies": {
        "item": {"kind": "counted"},
        "tag": {"kind": "counted"},
        "word": {"kind": "hashed"},
    },
    "tables": {"word": 50},
}


def columns(rows: int = ROWS) -> dict[str, Any]:
    return {
        "label": pa.array([n % 2 for n in range(rows)]),
        "item": pa.array([n % 7 for n in range(rows)]),
        "clicked": pa.array([[n % 7, (n + 1) % 7] for n in range(rows)]),
        "clicked_at": pa.array([[n, n + 1] for n in range(rows)]),
        "tag": pa.array([f"t{n % 3}" for n in range(rows)]),
        "words": pa.array([[f"w{n % 5}"] * (n % 4) for n in range(rows)]),
        "price": pa.array([n / 3 for n in range(rows)]),
        "user": pa.array([n % 11 for n in range(rows)]),
        "at": pa.array([1000 + n for n in range(rows)]),
    }


def write(path: Path, **changed: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**columns(), **changed}), path)


def prepare(raw: Path, out: Path | None = None, *, schema: dict[str, Any] | None = None, **options):
    (raw / "schema.yaml").write_text(yaml.safe_dump({**SCHEMA, **(schema or {})}))
    options = {"valid_percent": 10, "test_percent": 10, **options}
    out = out or raw.parent / "out"
    return prepare_parquet(raw=str(raw), schema=str(raw / "schema.yaml"), out=str(out), **options)


def prepared(out: Path) -> list[dict[str, Any]]:
    rows = [
        row
        for split in ("train", "valid", "test")
        for row in pq.read_table(out / split).to_pylist()
    ]
    return sorted(rows, key=lambda row: row["at"])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write(tmp_path / "raw" / "train" / "0.parquet")
    return tmp_path / "raw"


@pytest.fixture
def plain(raw: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of plain types."""
    prepare(raw, tmp_path / "plain")
    return prepared(tmp_path / "plain")


TEXT = columns()["tag"]
LISTS = columns()["words"]


def of_dictionary(lists: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(lists.offsets, lists.values.dictionary_encode())


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tag", TEXT.cast(pa.large_string())),
        ("tag", TEXT.cast(pa.string_view())),
        ("tag", TEXT.cast(pa.binary())),
        ("tag", TEXT.cast(pa.large_binary())),
        ("tag", TEXT.dictionary_encode()),
        ("tag", pa.array([f"t{n % 3}".encode() for n in range(ROWS)], pa.binary(2))),
        ("words", of_dictionary(LISTS)),
        ("words", LISTS.cast(pa.list_(pa.binary()))),
        ("words", LISTS.cast(pa.large_list(pa.string_view()))),
        ("words", pa.array(["^".join(words) for words in LISTS.to_pylist()])),
        ("clicked", columns()["clicked"].cast(pa.list_(pa.int64(), 2))),
        ("clicked", columns()["clicked"].cast(pa.list_(pa.uint64()))),
        ("item", columns()["item"].cast(pa.decimal128(20, 0))),
        ("item", columns()["item"].cast(pa.float64())),
        ("at", columns()["at"].cast(pa.timestamp("s"))),
        ("at", columns()["at"].cast(pa.timestamp("s")).cast(pa.timestamp("ns", "UTC"))),
        ("clicked_at", columns()["clicked_at"].cast(pa.list_(pa.timestamp("s")))),
        ("price", columns()["price"].cast(pa.float32())),
        ("label", columns()["label"].cast(pa.bool_())),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type),
)
def test_a_value_is_the_same_whatever_its_type(raw, plain, column, values):
    write(raw / "train" / "0.parquet", **{column: values})
    prepare(raw)
    assert prepared(raw.parent / "out") == plain


def test_dates_are_times_and_ids(raw):
    days = pa.array(range(ROWS), pa.int32()).cast(pa.date32())
    write(
        raw / "train" / "0.parquet",
        at=days,
        tag=pa.array([18_000 + n % 3 for n in range(ROWS)], pa.int32()).cast(pa.date32()),
    )
    prepare(raw)
    rows = prepared(raw.parent / "out")
    assert [row["at"] for row in rows] == [86_400 * day for day in range(ROWS)]
    values = pq.read_table(raw.parent / "out" / "vocabularies" / "tag.parquet")["value"].to_pylist()
    assert sorted(values) == ["2019-04-14", "2019-04-15", "2019-04-16"]


@pytest.mark.parametrize("null_first", [True, False])
def test_what_a_column_holds_is_decided_by_all_files(raw, null_first):
    names = ["0.parquet", "1.parquet"][:: 1 if null_first else -1]
    write(
        raw / "train" / names[0], tag=pa.nulls(ROWS), at=pa.array([5000 + n for n in range(ROWS)])
    )
    write(raw / "train" / names[1])
    report = prepare(raw, valid_by="rows")
    assert report.rows_bad == {}
    assert report.vocabularies["tag"] == 4
    ids = [row["tag"] for row in prepared(raw.parent / "out")]
    assert ids[ROWS:] == [0] * ROWS
    assert 0 not in ids[:ROWS]


def test_fingerprints_of_64_bits_are_hashed(raw):
    prints = [2**63 + n for n in range(ROWS)]
    write(raw / "train" / "0.parquet", tag=pa.array(prints, pa.uint64()))
    report = prepare(
        raw,
        schema={
            "vocabularies": {**SCHEMA["vocabularies"], "tag": {"kind": "hashed"}},
            "tables": {"word": 50, "tag": 90},
        },
    )
    assert report.rows_bad == {}
    ids = [row["tag"] for row in prepared(raw.parent / "out")]
    assert ids == hash_ids(pa.array(list(map(str, prints))), 90).tolist()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "clicked",
            pa.array([[[1]]] * ROWS),
            r"'clicked' is list<.*>>, but clicked is a list of ids a row; flatten",
        ),
        (
            "tag",
            columns()["clicked"],
            r"'tag' is list<.*>, but tag is one id a row; store one value a row, or describe",
        ),
        (
            "price",
            columns()["clicked"],
            r"'price' is list<.*>, but price is a number a row; store one value",
        ),
        (
            "price",
            pa.array(range(ROWS), pa.timestamp("s")),
            r"'price' is timestamp\[ms\], but price is a number a row; store seconds",
        ),
        (
            "clicked",
            pa.array([[0.5]] * ROWS),
            r"'clicked' is list<.*double>, but clicked is a list of ids a row; store whole",
        ),
        (
            "tag",
            pa.array([{"a": 1}] * ROWS),
            r"'tag' is struct<a: int64>, but tag is one id a row; store its parts",
        ),
        (
            "words",
            pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64())),
            r"'words' is map<.*>, but words is a list of ids a row; store",
        ),
        (
            "at",
            pa.array(range(ROWS), pa.duration("s")),
            r"'at' is duration\[s\], but at is a time a row; store its parts",
        ),
        ("label", columns()["clicked"], r"'label' is list<.*>, but label is a number a row"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
)
def test_a_type_that_no_row_can_satisfy_is_one_line(raw, column, values, message):
    write(raw / "train" / "1.parquet", **{column: values})
    with pytest.raises(DataError, match=rf"train/1\.parquet: column {message}") as error:
        prepare(raw)
    assert "\n" not in str(error.value)
    assert not (raw.parent / "out").exists()


def test_two_columns_of_one_name_are_refused(raw):
    table = pa.table(list(columns().values()) + [TEXT], names=[*columns(), "tag"])
    pq.write_table(table, raw / "train" / "0.parquet")
    with pytest.raises(DataError, match=r"0\.parquet has 2 columns of the name 'tag'; rename"):
        prepare(raw)


@pytest.mark.parametrize(
    "place", ["test.parquet/part-0.parquet", "test/dt=1/part-0.snappy.parquet"]
)
def test_a_split_may_be_a_folder_of_spark_or_hive(raw, place):
    write(raw / "test" / place if place.startswith("part") else raw / place)
    for mark in ("_SUCCESS", ".part-0.parquet.crc", "._part-1.parquet"):
        (raw / place).with_name(mark).write_text("x")
    report = prepare(raw, test_percent=0)
    assert report.splits["test"].rows == ROWS
    assert report.options["test_percent"] == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("test.csv", r"test\.csv is no Parquet, but has the name of the test split"),
        ("test/part-0.orc", r"raw/test holds no \.parquet file"),
        ("valid.parquet/_SUCCESS", r"raw/valid\.parquet holds no \.parquet file"),
        ("train.parquet", r"raw has train and train\.parquet; leave one"),
    ],
)
def test_a_split_that_is_there_is_never_taken_for_absent(raw, place, message):
    (raw / place).parent.mkdir(exist_ok=True)
    (raw / place).write_text("x")
    with pytest.raises(DataError, match=message):
        prepare(raw)


def test_a_byte_order_mark_is_no_part_of_a_vocabulary_or_schema(raw):
    (raw / "tags.txt").write_text("\ufefft0\r\nt1\r\nt2\r\n", encoding="utf-8")
    given = {**SCHEMA["vocabularies"], "tag": {"kind": "given", "file": "tags.txt"}}
    (raw / "schema.yaml").write_text(
        "\ufeff" + yaml.safe_dump({**SCHEMA, "vocabularies": given}), encoding="utf-8"
    )
    out = raw.parent / "out"
    prepare_parquet(raw=str(raw), schema=str(raw / "schema.yaml"), out=str(out))
    assert [row["tag"] for row in prepared(out)] == [1 + n % 3 for n in range(ROWS)]


@pytest.mark.parametrize("by", ["rows", "group", "time", "tail"])
def test_held_out_rows_decide_nothing(raw, by):
    """Values of held-out rows alone are unknown, and counts are those of training rows."""
    shares: dict[str, Any] = {"valid_percent": 30, "test_percent": 30, "valid_by": by}
    prepare(raw, **shares)
    splits = {
        s: pq.read_table(raw.parent / "out" / s).to_pylist() for s in ("train", "valid", "test")
    }
    trained = {row["at"] for row in splits["train"]}
    own = pa.array([f"t{n}" if 1000 + n not in trained else f"k{n % 2}" for n in range(ROWS)])
    write(raw / "train" / "0.parquet", tag=own)
    prepare(raw, raw.parent / "again", **shares)
    vocabulary = pq.read_table(raw.parent / "again" / "vocabularies" / "tag.parquet").to_pylist()
    assert {row["value"] for row in vocabulary} == {"k0", "k1"}
    for row in prepared(raw.parent / "again"):
        assert (row["tag"] == 0) == (row["at"] not in trained)


@pytest.mark.parametrize(
    ("times", "sizes"),
    [
        ([n // 20 for n in range(ROWS)], [20, 20, 20]),
        ([0] * 3 + [1] * 3 + [2] * 54, [3, 3, 54]),
        ([0] * 58 + [1, 2], [58, 1, 1]),
    ],
)
def test_ties_of_times_leave_every_split_some_rows(raw, times, sizes):
    write(raw / "train" / "0.parquet", at=pa.array(times))
    report = prepare(raw)
    assert [split.rows for split in report.splits.values()] == sizes


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        (
            {"at": pa.array([7] * ROWS)},
            {},
            r"all rows are from 7 to 7, with fewer than 3 different",
        ),
        ({"at": pa.array([7, 8] * (ROWS // 2))}, {}, r"from 7 to 8, with fewer than 3 different"),
        (
            {"user": pa.array([1] * ROWS)},
            {"valid_by": "group"},
            r"no row is left for the \w+ split.*by group from 60",
        ),
        (
            {},
            {"valid_by": "tail", "valid_percent": 1},
            r"no row is left for the valid split of 1 %, held out by tail",
        ),
    ],
)
def test_a_split_without_a_row_is_refused(raw, changed, options, message):
    write(raw / "train" / "0.parquet", **changed)
    with pytest.raises(DataError, match=message):
        prepare(raw, **options)
    assert not (raw.parent / "out").exists()


def test_an_empty_file_of_a_split_is_refused(raw):
    empty = pa.table(columns()).slice(0, 0)
    pq.write_table(empty, raw / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet: no row is left for the test split"):
        prepare(raw)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../x", "cannot name a table"),
        ("a.b", "cannot name a table"),
        ("", "cannot name a table"),
        ("forward", "is an attribute of PyTorch's modules"),
        ("training", "is an attribute of PyTorch's modules"),
        ("item_pooled", "is what the pooled copy of table 'item' is called"),
    ],
)
def test_a_name_that_harms_is_refused_and_nothing_is_written(raw, name, message):
    pooled = [{"name": "tag", "table": name}, SCHEMA["pooled"][1]]
    rules = {
        name: {"kind": "counted"},
        **{k: v for k, v in SCHEMA["vocabularies"].items() if k != "tag"},
    }
    before = sorted(raw.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        prepare(raw, schema={"pooled": pooled, "vocabularies": rules})
    assert sorted(raw.parent.rglob("*")) == sorted([*before, raw / "schema.yaml"])


@pytest.mark.parametrize("rows", [0, -3, 10**18, 2.5, "many", True])
def test_an_absurd_size_is_refused(raw, rows):
    with pytest.raises(
        ValueError, match=r"Schema\.tables\['word'\] must be a whole number of at least 1"
    ):
        prepare(raw, schema={"tables": {"word": rows}})


def test_remedies_fit(raw, caplog):
    write(raw / "train" / "0.parquet", label=pa.array([1 + n % 5 for n in range(ROWS)]))
    with pytest.raises(
        DataError, match=r"more than max_bad_rows 5 .*neither 0 nor 1.*6 of the first 8 rows are"
    ) as error:
        prepare(raw, valid_by="rows", max_bad_rows=5)
    assert "raise" not in str(error.value)
    write(raw / "train" / "0.parquet", price=pa.array([None] + [1.0] * (ROWS - 1)))
    with pytest.raises(DataError, match=r"price is missing; --fill_dense.*raise --max_bad_rows"):
        prepare(raw, valid_by="rows", max_bad_rows=0)
    with pytest.raises(
        ValueError, match=r"vocabularies\['tag'\] is 'counted', but must be a mapping.*kind: "
    ):
        prepare(
            raw,
            schema={
                "vocabularies": {**SCHEMA["vocabularies"], "tag": "counted"},
                "tables": {"word": 50, "tag": 2},
            },
        )
    write(raw / "train" / "0.parquet", at=pa.array([1_700_000_000_000 + n for n in range(ROWS)]))
    with caplog.at_level(logging.WARNING):
        prepare(raw)
    assert "is it in milliseconds?" in caplog.text
