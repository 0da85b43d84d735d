"""Mistakes in anyone's Parquet, in its description and in options, by their message."""

import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.own_tables import DESCRIPTION, prepare, read, ROWS, table, write_raw
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


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
        ("label", None, "label is missing"),
        ("weight", None, "weight is missing"),
        ("age", 8, "age has an id outside its table's 0 to 7"),
        ("age", -1, "age has an id outside its table's 0 to 7"),
        ("price", float("nan"), "price is no finite number"),
        ("price", None, "price is missing; --fill_dense NUMBER gives missing ones a value"),
        ("weight", -1.0, "weight is below 0"),
        ("at", None, "at is missing"),
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


def test_a_missing_weight_is_not_filled(raw, tmp_path, caplog):
    pq.write_table(spoil("weight", 17, None), raw / "train" / "1.parquet")
    report = prepare(raw, tmp_path / "out", fill_dense=0.0)
    assert report.rows_bad == {"1.parquet": 1}
    assert "1.parquet row 17: malformed: 'weight is missing'" in caplog.text


@pytest.mark.parametrize("column", ["item", "clicked", "tags", "user"])
def test_bytes_that_are_no_text_make_a_bad_row(raw, tmp_path, caplog, column):
    spoiled = table(100)
    rows = [
        [value.encode() for value in row] if isinstance(row, list) else row.encode()
        for row in spoiled[column].to_pylist()
    ]
    rows[17] = [b"i1", b"\xff"] if isinstance(rows[17], list) else b"\xff"
    spoiled = spoiled.set_column(spoiled.column_names.index(column), column, pa.array(rows))
    pq.write_table(spoiled, raw / "train" / "1.parquet")
    report = prepare(raw, tmp_path / "out")
    reason = f"malformed: '{column} holds bytes that are no UTF-8'"
    assert f"{raw}/train/1.parquet row 17: {reason}" in caplog.text
    assert report.rows_bad == {"1.parquet": 1}
    assert (report.rows_read, report.rows_kept) == (ROWS, ROWS - 1)


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
        (
            {"columns": ["a"]},
            r"schema\.yaml is not a schema: columns is a list, and must .*mapping",
        ),
        ({"columns": {"item": 3}}, r"is not a schema: columns\.item is 3, and must be text"),
        ({"columns": "a"}, r"is not a schema: columns is 'a', .*mapping"),
        ({"vocabularies": ["item"]}, r"is not a schema: Schema\.vocabularies is a list"),
        ({"tables": ["item"]}, r"is not a schema: Schema\.tables is a list"),
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


@pytest.mark.parametrize(
    ("column", "remedy"),
    [
        ("clicked_numbers", "or texts; or give its table a bucketed vocabulary, for numbers"),
        ("clicked_at", "store whole numbers, without missing entries"),
    ],
)
def test_lists_of_decimals_with_places_are_refused_before_a_row_is_read(
    raw, tmp_path, column, remedy
):
    rows = table(100)
    parts = [[Decimal(f"{number}.25") for number in row] for row in rows[column].to_pylist()]
    kind = pa.list_(pa.decimal128(10, 2))
    place = rows.column_names.index(column)
    rows = rows.set_column(place, column, pa.array(parts, kind))
    pq.write_table(rows, raw / "train" / "1.parquet")
    with pytest.raises(DataError, match=rf"1\.parquet: column '{column}' is .*decimal.*{remedy}"):
        prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
