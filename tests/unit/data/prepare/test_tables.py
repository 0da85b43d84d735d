"""Tables of many pieces and shards: every row once, in an order that nothing changes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.processes import run_command
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare import split_rules, tables
from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, HoldOut, Inputs
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.sources import CsvFile
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.schema import IdFeature, Schema, VocabularyRule

SCHEMA = Schema(
    dataset="log",
    tables={"item": 2},
    candidate=(IdFeature(name="item", table="item"),),
    dense=("place",),
    group="user",
    vocabularies={"item": VocabularyRule(kind="counted", file="vocabularies/item.parquet")},
)
COLUMNS = "item,place,label,user\n"
HELD = HoldOut(valid_percent=10, by="rows")


def write(path: Path, rows: range) -> CsvFile:
    path.write_text(COLUMNS + "".join(f"{r % 97},{r},{r % 2},{r % 11}\n" for r in rows))
    return CsvFile(str(path), block_bytes=4096)


def prepare(
    inputs: Inputs,
    out: Path,
    *,
    workers=2,
    hold_out=HELD,
    max_bad_rows=0,
    scratch=None,
    schema=SCHEMA,
    columns=None,
) -> Report:
    return prepare_tables(
        inputs,
        ColumnMapping(schema=schema, raw=columns or {}),
        hold_out=hold_out,
        out=str(out),
        seed=3,
        workers=workers,
        max_bad_rows=max_bad_rows,
        scratch=scratch,
    )


def places(out: Path, split: str) -> list[int]:
    return [int(row) for row in pq.read_table(out / split)["place"].to_pylist()]


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of some hundred rows, so that a log of a few thousand has many."""
    monkeypatch.setattr(tables, "shard_rows", lambda bytes_per_row: 300)
    monkeypatch.setattr(split_rules, "OPEN_SHARDS", 4)


@pytest.mark.usefixtures("small_shards")
def test_every_row_is_somewhere_once_in_an_order_of_its_own(tmp_path):
    inputs = Inputs(
        train=(write(tmp_path / "a", range(3000)), write(tmp_path / "b", range(3000, 5000))),
        test=(write(tmp_path / "t", range(5000, 5700)),),
    )
    found = []
    for workers in (1, 4):
        out = tmp_path / f"out{workers}"
        report = prepare(inputs, out, workers=workers)
        found.append({split: places(out, split) for split in ("train", "valid", "test")})
        assert report.rows_kept == 5700
    assert found[0] == found[1]
    train, valid, test = found[0].values()
    assert sorted(train + valid) == list(range(5000))
    assert test == list(range(5000, 5700))
    assert valid == sorted(valid)
    assert 400 < len(valid) < 600
    # Four shards share a part of the log, so a file has rows of a whole part, mixed.
    files = sorted((tmp_path / "out1" / "train").iterdir())
    assert len(files) == 16
    first = [int(row) for row in pq.read_table(files[0])["place"].to_pylist()]
    assert max(first) - min(first) > 1000
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.25


@pytest.mark.parametrize("by", ["rows", "group", "time", "tail"])
def test_raw_files_are_read_once(tmp_path, monkeypatch, by):
    """They may be remote, and parsing them is half of the work."""
    read = []
    batches = CsvFile.batches

    def spy(self, columns):
        read.append(Path(self.path).name)
        yield from batches(self, columns)

    monkeypatch.setattr(CsvFile, "batches", spy)
    inputs = Inputs(
        train=(write(tmp_path / "a", range(900)), write(tmp_path / "b", range(900, 1500)))
    )
    report = prepare(
        inputs,
        tmp_path / "out",
        hold_out=HoldOut(valid_percent=30, by=by),
        schema=replace(SCHEMA, time="at"),
        columns={"at": "place"},
    )
    assert read == ["a", "b"]
    assert report.rows_kept == 1500
    assert report.splits["valid"].rows > 0


def test_a_split_may_be_empty_and_keeps_its_columns(tmp_path):
    inputs = Inputs(train=(write(tmp_path / "a", range(50)),))
    report = prepare(inputs, tmp_path / "out", hold_out=HoldOut(valid_percent=0, by="rows"))
    assert [split.rows for split in report.splits.values()] == [50, 0, 0]
    assert report.splits["test"].label_rate is None
    kinds = [pq.read_schema(next((tmp_path / "out" / s).iterdir())) for s in ("train", "test")]
    assert kinds[0] == kinds[1]


def test_bad_lines_are_told_and_counted(tmp_path, caplog):
    file = write(tmp_path / "a", range(1000))
    lines = (tmp_path / "a").read_text().splitlines()
    lines[500] = "1,2"
    lines[20] = "x,1,0,1"
    lines[900] = "1,1,7,1"
    (tmp_path / "a").write_text("\n".join(lines) + "\n")
    report = prepare(Inputs(train=(file,)), tmp_path / "out", workers=3, max_bad_rows=3)
    told = [message for message in caplog.messages if "malformed" in message]
    assert sorted(message.split(": ", 1)[0].split()[-1] for message in told) == ["21", "501", "901"]
    for text in ("item is no whole number", "label is neither 0 nor 1", "1,2"):
        assert sum(text in message for message in told) == 1
    assert (report.rows_read, report.rows_kept, report.rows_bad) == (1000, 997, {"a": 3})


def test_no_good_row_and_missing_columns_are_named(tmp_path):
    (tmp_path / "a").write_text(COLUMNS)
    with pytest.raises(DataError, match=r"a has no good row to train on"):
        prepare(Inputs(train=(CsvFile(str(tmp_path / "a")),)), tmp_path / "out")
    (tmp_path / "b").write_text("item,label,user\n1,1,1\n")
    with pytest.raises(DataError, match=r"b lacks the columns place; it has item, label, user"):
        prepare(Inputs(train=(CsvFile(str(tmp_path / "b")),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scratch_files_go_where_they_are_told_and_vanish(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inputs = Inputs(train=(write(tmp_path / "a", range(100)),))
    prepare(inputs, tmp_path / "out", workers=1, scratch=str(scratch))
    assert list(scratch.iterdir()) == []
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PEAKS = """
import json, os, sys
from pathlib import Path
from tests.unit.data.prepare.test_tables import CsvFile, Inputs, prepare, write
from torchrec_hilomoe.data.prepare import shards
from torchrec_hilomoe.runtime.process import peak_resident_bytes

folder = Path(sys.argv[1])
shards.SHARD_BYTES = 1 << 20
peaks = []
for number, rows in enumerate(map(int, sys.argv[2:])):
    writing = os.fork()  # its memory is not this process's
    if not writing:
        write(folder / f"{number}", range(rows))
        os._exit(0)
    os.waitpid(writing, 0)
    file = CsvFile(str(folder / f"{number}"), block_bytes=1 << 18)
    prepare(Inputs(train=(file,)), folder / f"out{number}")
    peaks.append(peak_resident_bytes())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    small, large = 100_000, 1_600_000
    # The heap finds its size in the first two.
    sizes = map(str, [small, small, small, large])
    done = run_command(
        [sys.executable, "-c", PEAKS, tmp_path, *sizes], env={"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    *_, before, after = json.loads(done.stdout.splitlines()[-1])
    rows = [pq.read_table(tmp_path / f"out{number}" / "train").nbytes for number in (2, 3)]
    # Whoever held the rows, or the text that they are made of, would need all of their growth.
    assert after - before < (rows[1] - rows[0]) / 2
