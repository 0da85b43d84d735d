"""Raw files in pieces: every row once, and places that a person finds in the file."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.raw import CsvFile, ParquetFile


def everything(file, columns):
    """Rows with their places, and the malformed lines."""
    rows, malformed = [], []
    for piece in file.pieces(columns):
        table = piece.load()
        malformed += piece.malformed
        places = [piece.place(piece.first + row) for row in range(table.num_rows)]
        rows += zip(places, table.to_pylist(), strict=True)
    return rows, malformed


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_lines_are_numbered_as_editors_do(tmp_path, zipped, block_bytes):
    lines = ["a,b,c", *(f"{row},x{row},{row * row}" for row in range(60))]
    lines[5] = "one field"
    lines[6] = "too,many,fields,here"
    lines[40] = "again,two"
    text = "\n".join(lines) + "\n"
    path = tmp_path / ("t.csv.gz" if zipped else "t.csv")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    file = CsvFile(str(path), block_bytes=block_bytes)
    assert file.columns().names == ["a", "b", "c"]
    rows, malformed = everything(file, ["c", "a"])
    assert [place for place, _ in malformed] == ["line 6", "line 7", "line 41"]
    for place, row in rows:
        number = int(place.removeprefix("line ")) - 1
        a, _, c = lines[number].split(",")
        assert row == {"c": c, "a": a}
    assert len(rows) == 57


def test_files_without_a_header_are_named_and_empty_fields_are_missing(tmp_path):
    (tmp_path / "t.txt").write_text("1\t\tx\n2\t5\t\n")
    rows, _ = everything(
        CsvFile(str(tmp_path / "t.txt"), names=["a", "b", "c"], separator="\t"), ["a", "b", "c"]
    )
    assert rows == [
        ("line 1", {"a": "1", "b": None, "c": "x"}),
        ("line 2", {"a": "2", "b": "5", "c": None}),
    ]


def test_parquet_is_cut_into_pieces(tmp_path):
    table = pa.table({"a": list(range(25)), "b": ["x"] * 25})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    file = ParquetFile(str(tmp_path / "t.parquet"), piece_rows=4)
    rows, _ = everything(file, ["a"])
    assert rows == [(f"row {row}", {"a": row}) for row in range(25)]
    assert len(list(file.pieces(["a"]))) == 3 + 3 + 2


def test_a_large_row_group_is_read_a_piece_at_a_time(tmp_path):
    """pyarrow's own row groups have a million rows; a piece holds a small share of one."""
    rows, wide = 40_000, 32
    lists = np.random.default_rng(0).integers(0, 1 << 40, size=(rows, wide))
    table = pa.table({"a": range(rows), "b": lists.tolist()})
    pq.write_table(table, tmp_path / "t.parquet")
    del table
    file = ParquetFile(str(tmp_path / "t.parquet"), piece_rows=1000)
    held, most, seen = pa.total_allocated_bytes(), 0, 0
    for piece in file.pieces(["a", "b"]):
        part = piece.load()
        assert part["a"].to_pylist() == list(range(piece.first, piece.first + 1000))
        assert part["b"].to_pylist() == lists[piece.first : piece.first + 1000].tolist()
        seen += part.num_rows
        most = max(most, pa.total_allocated_bytes() - held)
    assert seen == rows
    assert most < lists.nbytes / 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (lambda path: CsvFile(path, source="Get it again."), b"a\n\xff\xfe\n", r"Get it again\."),
        (lambda path: CsvFile(path + ".gz"), b"no gzip", "t.gz cannot be read"),
        (ParquetFile, b"PAR1 no parquet", "cannot be read as Parquet .*whole copy"),
        (ParquetFile, b"", "cannot be read as Parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path, file, content, message):
    (tmp_path / "t").write_bytes(content)
    (tmp_path / "t.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        everything(file(str(tmp_path / "t")), ["a"])


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as Parquet"):
        everything(ParquetFile(str(path)), ["a"])
