"""``check`` says every fault of a folder in a line of its own, and nothing of one that is whole."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import replace_column, SCHEMA, toy_table, write_folder
from tests.helpers.raw_logs import criteo_rows, write_criteo
from tests.unit.data.prepare.test_command import ask as ask  # a fixture
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import SUCCESS_FILE
from torchrec_hilomoe.data.prepare.check import check_prepared
from torchrec_hilomoe.data.prepare.criteo import prepare_criteo
from torchrec_hilomoe.data.schema import FrozenTable, SCHEMA_FILE, VocabularyRule

COUNTED = replace(
    SCHEMA, vocabularies={"kind": VocabularyRule(kind="counted", file="vocabularies/kind.parquet")}
)
VALUES = ["a", "b", "c", "d"]


@pytest.fixture
def folder(tmp_path):
    """What another engine may have written: no report, one vocabulary."""
    path = tmp_path / "d"
    splits = {"train": [toy_table(30), toy_table(10)], "valid": [toy_table(9)], "test": []}
    write_folder(path, splits)
    pq.write_table(toy_table(0), path / "test" / "part-0.parquet")
    COUNTED.save(str(path / SCHEMA_FILE))
    write_vocabulary(path, VALUES, [1, 2, 3, 4])
    return path


def write_vocabulary(path, values, ids):
    (path / "vocabularies").mkdir(exist_ok=True)
    pq.write_table(pa.table({"value": values, "id": ids}), path / "vocabularies/kind.parquet")


def faults(path) -> tuple[str, ...]:
    return check_prepared(str(path)).faults


def test_what_prepare_writes_is_whole(tmp_path):
    write_criteo(tmp_path / "train.txt", criteo_rows(100))
    prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"), min_count=2)
    found = check_prepared(str(tmp_path / "out"))
    assert found.faults == ()
    assert found.rows == {"train": 80, "valid": 10, "test": 10}
    (tmp_path / "out" / "vocabularies" / "C3.parquet").unlink()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    report["splits"]["valid"]["rows"] = 11
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    first, second = faults(tmp_path / "out")
    assert "C3.parquet cannot be read as a vocabulary, with columns value and id" in first
    assert second.endswith("report.json: says 11 rows of valid, its files have 10")


def test_a_folder_of_another_engine_is_whole_without_a_report(folder):
    assert check_prepared(str(folder)).rows == {"train": 40, "valid": 9, "test": 0}
    assert faults(folder) == ()


def test_every_file_and_every_column_is_told(folder):
    for index in (0, 1):
        path = folder / "train" / f"part-0000{index}.parquet"
        table = pq.read_table(path).drop_columns(["price"])
        pq.write_table(table, path)
    (folder / "valid" / "part-00000.parquet").write_bytes(b"PAR1 no PAR1")
    (folder / "test" / "part-0.parquet").unlink()
    found = faults(folder)
    assert len(found) == 4
    assert "train/part-00000.parquet: column 'price' is missing." in found[0]
    assert "train/part-00001.parquet: column 'price' is missing." in found[1]
    assert "valid/part-00000.parquet cannot be read as Parquet" in found[2]
    assert "test holds no .parquet file" in found[3]


def test_bad_rows_are_those_that_training_would_skip(folder):
    table = replace_column(toy_table(9), "item", [1, 99, 2, 99, 99, 99, 99, 3, 4])
    pq.write_table(table, folder / "valid" / "part-00000.parquet")
    found = faults(folder)
    assert len(found) == 4
    assert "row group 0: row 1: item has id 99, outside its table's 0 to 19" in found[0]
    assert found[3].endswith("row group 0: 2 more bad rows")


def test_a_vocabulary_has_each_value_and_each_id_once(folder):
    write_vocabulary(folder, ["a", "b", "b"], [1, 2, 4])
    ids, values, size = faults(folder)
    assert "kind.parquet: ids are not 1 to 3, each once" in ids
    assert "kind.parquet: a value occurs twice" in values
    assert "3 values want 4 rows of table 'kind', schema says 5" in size


@pytest.mark.parametrize(
    "values", [["a", "b"], [0.0, 1.0], [float("-inf"), 2.0, 1.0]], ids=["texts", "0", "falling"]
)
def test_buckets_rise_from_minus_infinity(folder, values):
    rule = VocabularyRule(kind="bucketed", buckets=4, file="vocabularies/kind.parquet")
    tables = {**SCHEMA.tables, "kind": len(values) + 1}
    # Rows of ids that the smaller table lacks are told, too.
    replace(SCHEMA, tables=tables, vocabularies={"kind": rule}).save(str(folder / SCHEMA_FILE))
    write_vocabulary(folder, values, list(range(1, len(values) + 1)))
    (found,) = (fault for fault in faults(folder) if "kind.parquet" in fault)
    assert "values of buckets are string" in found or "buckets, rising" in found


def test_vectors_have_the_shape_of_their_table(folder):
    frozen = {"place": FrozenTable(width=8, file="vectors/place.npy")}
    replace(COUNTED, frozen=frozen).save(str(folder / SCHEMA_FILE))
    (folder / "vectors").mkdir()
    np.save(folder / "vectors" / "place.npy", np.zeros((3, 8), dtype=np.float32))
    (found,) = faults(folder)
    assert "holds float32 of shape (3, 8), the schema wants float32 of shape (4, 8)" in found


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / SUCCESS_FILE).unlink(), "_SUCCESS is missing"),
        (lambda path: (path / SCHEMA_FILE).unlink(), "schema.json is missing"),
        (lambda path: (path / SCHEMA_FILE).write_text("{"), "schema.json is not a schema"),
    ],
    ids=["half made", "no schema", "torn schema"],
)
def test_of_a_folder_that_is_half_made_that_is_all(folder, break_it, message):
    break_it(folder)
    (found,) = faults(folder)
    assert message in found


def test_training_rows_there_must_be(folder):
    for path in (folder / "train").iterdir():
        pq.write_table(toy_table(0), path)
    (found,) = faults(folder)
    assert found.endswith("train has no rows, so that nothing can be trained.")


def test_the_command_ends_with_1_for_faults_and_2_for_no_folder(folder, ask):
    code, shown, told = ask("check", str(folder))
    assert (code, told) == (0, "")
    assert shown == f"{folder}: whole; read train 40 rows, valid 9 rows, test 0 rows\n"
    write_vocabulary(folder, VALUES[:3], [1, 2, 3])
    code, shown, told = ask("check", str(folder))
    assert (code, told) == (1, "")
    assert len(shown.splitlines()) == 2
    assert f"{folder}: 1 fault; read train 40 rows" in shown
    with pytest.raises(DataError, match="there is no folder nowhere"):
        check_prepared("nowhere")
    code, shown, told = ask("check", "nowhere")
    assert (code, shown) == (2, "")
    assert told.startswith("error: there is no folder nowhere")
