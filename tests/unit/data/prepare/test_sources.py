"""Raw files in batches: every row once, and places that a person finds in the file."""

import gzip
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.sources import (
    CsvFile,
    LineFile,
    MALFORMED,
    ParquetFile,
    PLACE,
    ROW,
)


def everything(file, columns, **types):
    """Rows with their places, and the malformed lines."""
    kinds = pa.schema([(name, types.get(name, pa.large_string())) for name in columns])
    rows, malformed = [], []
    for batch in file.batches(kinds):
        for row in batch.to_dicts():
            place, text, number = row.pop(PLACE), row.pop(MALFORMED), row.pop(ROW)
            (rows if text is None else malformed).append((place, row if text is None else text))
            assert (number is None) == (text is not None) or not isinstance(file, CsvFile)
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
    assert malformed == [(line, lines[line - 1]) for line in (6, 7, 41)]
    for place, row in rows:
        a, _, c = lines[place - 1].split(",")
        assert row == {"c": c, "a": a}
    assert [place for place, _ in rows] == [n for n in range(2, 62) if n not in (6, 7, 41)]


def test_lines_are_numbered_whichever_thread_is_ahead(tmp_path):
    # Arrow parses the next block, and tells its malformed lines, while a batch is numbered.
    malformed = range(25, 1000, 50)
    lines = ["a,b", *(f"{row},x" for row in range(1000))]
    for line in malformed:
        lines[line - 1] = "one field"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    file = CsvFile(str(tmp_path / "t.csv"), block_bytes=256)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: everything(file, ["a"]), range(60)))
    for rows, bad in found:
        assert [line for line, _ in bad] == list(malformed)
        assert all(row["a"] == str(line - 2) for line, row in rows)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    for name in ("with", "without"):
        mark = "\ufeff" if name == "with" else ""
        (tmp_path / name).write_text(f"{mark}a,b\n1,2\n", encoding="utf-8")
    found = [CsvFile(str(tmp_path / name)) for name in ("with", "without")]
    assert found[0].columns() == found[1].columns()
    assert everything(found[0], ["a"]) == everything(found[1], ["a"])


def test_lines_that_the_pattern_does_not_match_are_malformed(tmp_path):
    (tmp_path / "t").write_bytes("1::é\r\nno\n\n3::x".encode("latin-1"))
    file = LineFile(str(tmp_path / "t"), "(?P<n>[0-9])::(?P<t>.*)", encoding="latin-1")
    assert file.columns().names == ["n", "t"]
    rows, malformed = everything(file, ["n", "t"])
    assert rows == [(1, {"n": "1", "t": "é"}), (4, {"n": "3", "t": "x"})]
    assert malformed == [(2, "no"), (3, "")]


def test_files_without_a_header_are_named_and_empty_fields_are_missing(tmp_path):
    (tmp_path / "t.txt").write_text("1\t\tx\n2\t5\t\n")
    rows, _ = everything(
        CsvFile(str(tmp_path / "t.txt"), names=["a", "b", "c"], separator="\t"), ["a", "b", "c"]
    )
    assert rows == [
        (1, {"a": "1", "b": None, "c": "x"}),
        (2, {"a": "2", "b": "5", "c": None}),
    ]


def test_parquet_is_cut_into_batches(tmp_path):
    table = pa.table({"a": list(range(25)), "b": ["x"] * 25})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10)
    file = ParquetFile(str(tmp_path / "t.parquet"), batch_rows=4)
    rows, _ = everything(file, ["a"], a=pa.int64())
    assert rows == [(row, {"a": row}) for row in range(25)]
    assert file.rows() == 25
    assert max(len(batch) for batch in file.batches(pa.schema([("a", pa.int64())]))) == 4


def test_a_large_row_group_is_read_a_batch_at_a_time(tmp_path):
    """pyarrow's own row groups have a million rows; a batch holds a small share of one."""
    rows, wide = 40_000, 32
    lists = np.random.default_rng(0).integers(0, 1 << 40, size=(rows, wide))
    table = pa.table({"a": range(rows), "b": lists.tolist()})
    pq.write_table(table, tmp_path / "t.parquet")
    del table
    file = ParquetFile(str(tmp_path / "t.parquet"), batch_rows=1000)
    held, most, seen = pa.total_allocated_bytes(), 0, 0
    for batch in file.batches(pa.schema([("a", pa.int64()), ("b", pa.large_list(pa.int64()))])):
        assert batch["a"].to_list() == list(range(seen, seen + 1000))
        assert batch["b"].to_list() == lists[seen : seen + 1000].tolist()
        seen += batch.height
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


MOMENTS = [
    *(-1, 0, 1, 999, 1000, -1000, -1001, 10**9, -(10**9), 1_700_000_000_123_456_789),
    *(2**63 - 1, 1 - 2**63, None),
]
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata", "-03:30"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_fractions_of_a_second_are_rounded_down(tmp_path, unit, zone):
    """Before 1970, too; plain, in lists of every kind, and in dictionaries."""
    kind = pa.timestamp(unit, zone)
    moments = pa.array([m for m in MOMENTS if m is None or unit == "ns" or abs(m) < 10**15], kind)
    offsets = pa.array(range(len(moments) + 1), pa.int32())
    table = pa.table(
        {
            "one": moments,
            "many": pa.ListArray.from_arrays(offsets, moments),
            "fixed": pa.FixedSizeListArray.from_arrays(moments, 1),
            "named": moments.dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", version="2.6")
    whole = [
        None if moment is None else moment // PER_SECOND[unit]
        for moment in moments.cast(pa.int64()).to_pylist()
    ]
    seconds, lists = pa.timestamp("s"), pa.large_list(pa.timestamp("s"))
    kinds = {"one": seconds, "many": lists, "fixed": lists, "named": seconds}
    for batch in ParquetFile(str(tmp_path / "t.parquet")).batches(pa.schema(kinds.items())):
        for name in kinds:
            values = batch[name].explode() if kinds[name] == lists else batch[name]
            assert values.dt.epoch("s").to_list() == whole, name


def not_utf_8(kind):
    """An array with a value that is no UTF-8, also of the type that promises it."""
    plain = pa.array([b"a", b"\xff\xfe", None, "é".encode()], pa.binary())
    if kind == pa.string():
        return pa.Array.from_buffers(pa.string(), len(plain), plain.buffers())
    return plain.cast(kind)


TEXTS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.string()]


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_a_value_that_is_no_text_makes_its_row_malformed(tmp_path, kind):
    values = not_utf_8(kind)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 1, 3, 4], pa.int32()), values)
    table = pa.table({"n": [0, 1, 2, 3], "one": values, "many": lists, "fine": ["x"] * 4})
    pq.write_table(table, tmp_path / "t.parquet")
    file = ParquetFile(str(tmp_path / "t.parquet"), batch_rows=2)
    many = pa.large_list(pa.large_string())
    rows, malformed = everything(file, ["n", "one", "fine"], n=pa.int64())
    assert rows == [
        (0, {"n": 0, "one": "a", "fine": "x"}),
        (2, {"n": 2, "one": None, "fine": "x"}),
        (3, {"n": 3, "one": "é", "fine": "x"}),
    ]
    assert malformed == [(1, "one holds bytes that are no UTF-8")]
    rows, malformed = everything(file, ["many"], many=many)
    assert rows == [(0, {"many": ["a"]}), (1, {"many": []}), (3, {"many": ["é"]})]
    assert malformed == [(2, "many holds bytes that are no UTF-8")]


def test_a_column_that_cannot_be_read_is_named_with_its_file(tmp_path):
    pq.write_table(pa.table({"a": ["1", "x"], "b": ["1", "2"]}), tmp_path / "t.parquet")
    file = ParquetFile(str(tmp_path / "t.parquet"))
    assert everything(file, ["b"], b=pa.int64())[0] == [(0, {"b": 1}), (1, {"b": 2})]
    with pytest.raises(
        DataError, match=r"t\.parquet: column 'a' is string and cannot be read as int64 \(.*'x'"
    ):
        everything(file, ["a"], a=pa.int64())
