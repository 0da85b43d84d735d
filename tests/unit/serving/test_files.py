"""``score_files``: a file of probabilities for each file of rows, or none and why."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import replace_column
from torchrec_hilomoe.serving.files import score_files


@pytest.fixture
def files(tmp_path, rows):
    (tmp_path / "data").mkdir()
    for name, table in {"a": rows, "b": rows.slice(3, 5), "c": rows.slice(0, 0)}.items():
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet", row_group_size=7)
    return tmp_path


def probabilities(path):
    return pq.read_table(path)["probability"].to_numpy()


def test_files_are_scored_in_order_and_those_that_are_there_are_left(scorer, rows, files):
    written = score_files(scorer, [str(files / "data")], str(files / "out"))
    assert [path[-9:] for path in written] == ["a.parquet", "b.parquet", "c.parquet"]
    assert list(written.values()) == [len(rows), 5, 0]
    want = scorer.score(rows)
    assert np.array_equal(probabilities(files / "out" / "a.parquet"), want)
    assert len(probabilities(files / "out" / "c.parquet")) == 0
    (files / "out" / "b.parquet").unlink()
    again = score_files(scorer, [str(files / "data")], str(files / "out"))
    assert [path[-9:] for path in again] == ["b.parquet"]


def test_a_row_that_cannot_be_scored_is_named_with_its_file_and_leaves_no_file(scorer, rows, files):
    wrong = replace_column(rows, "item", pa.array([99] * len(rows)))
    pq.write_table(wrong, files / "data" / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, rows from 0: row 0: item has id 99"):
        score_files(scorer, [str(files / "data")], str(files / "out"))
    assert [path.name for path in (files / "out").iterdir()] == ["a.parquet"]


def test_files_that_are_missing_or_none_are_told(scorer, files):
    (files / "empty").mkdir()
    (files / "x.parquet").write_text("no")
    for path, told in {
        "absent": "is not there",
        "empty": r"has no \.parquet file",
        "x.parquet": "is no Parquet file",
    }.items():
        with pytest.raises(ValueError, match=told):
            score_files(scorer, [str(files / path)], str(files / "out"))
    twice = [str(files / "data" / "a.parquet")] * 2
    with pytest.raises(ValueError, match=r"two files of --data are called a\.parquet"):
        score_files(scorer, twice, str(files / "out"))
    with pytest.raises(ValueError, match="is the folder of"):
        score_files(scorer, twice[:1], str(files / "data"))
