"""Criteo's two layouts: texts counted, counts squeezed, rows split in the order of the file."""

from math import log1p

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.raw_logs import criteo_rows, write_criteo, write_csv
from tests.helpers.rounding import rounded
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import load_schema
from torchrec_hilomoe.data.prepare.criteo import criteo_schema, FIELDS, prepare_criteo


def read(out, split):
    return pq.read_table(out / split).to_pylist()


def test_the_challenges_file_is_cut_in_its_order(tmp_path):
    write_criteo(tmp_path / "train.txt", criteo_rows())
    report = prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"), min_count=3)
    assert [split.rows for split in report.splits.values()] == [160, 20, 20]
    assert report.options["held_out_by"] == "tail"
    source = criteo_rows()
    tables = load_schema(str(tmp_path / "out")).tables
    for name in FIELDS:
        values = [row[name] for row in source[:160] if row[name] is not None]
        frequent = {value for value in values if values.count(value) >= 3}
        assert tables[name] == len(frequent) + 2
    assert load_schema(str(tmp_path / "out")) == criteo_schema(dict(tables), min_count=3)
    ids = {
        row["value"]: row["id"]
        for row in pq.read_table(tmp_path / "out" / "vocabularies" / "C7.parquet").to_pylist()
    }
    for split, start in (("valid", 160), ("test", 180)):
        for got, want in zip(read(tmp_path / "out", split), source[start:], strict=False):
            assert got["C7"] == ids.get(want["C7"], tables["C7"] - 1)
            value = log1p(max(want["I3"] or 0, 0))
            assert got["I3"] == rounded(value, dtype=torch.float32)
            assert (got["label"], got["group"]) == (want["label"], 0)


def test_files_that_are_split_already_stay_so(tmp_path):
    for split, count, seed in (("train", 90, 0), ("valid", 30, 1), ("test", 20, 2)):
        write_csv(tmp_path / f"{split}.csv", criteo_rows(count, seed))
    report = prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"))
    assert [split.rows for split in report.splits.values()] == [90, 30, 20]
    labels = [row["label"] for row in read(tmp_path / "out", "valid")]
    assert labels == [row["label"] for row in criteo_rows(30, 1)]


def test_missing_files_and_rows_are_named(tmp_path):
    with pytest.raises(DataError, match=r"neither train\.txt nor train\.txt\.gz.*name its folder"):
        prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"))
    write_criteo(tmp_path / "train.txt", criteo_rows(3))
    with (tmp_path / "train.txt").open("a") as sink:
        sink.write("1\t2\n")
    with pytest.raises(DataError, match=r"more than max_bad_rows 0 .*train\.txt line 4: malformed"):
        prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"), max_bad_rows=0)
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(DataError, match=r"train\.txt"):
        prepare_criteo(raw=str(tmp_path), out=str(tmp_path / "out"))
