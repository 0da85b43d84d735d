"""The public sets: the benchmark's vocabularies, histories cut its way, honest splits, reports."""

import json
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.fuxictr import fuxictr_preprocessing
from tests.helpers.raw_logs import alimama_rows, write_csv, write_vectors, x1_rows
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import load_schema, ParquetSource
from torchrec_hilomoe.data.prepare import taobao_ad
from torchrec_hilomoe.data.prepare.amazon_electronics import prepare_amazon_electronics
from torchrec_hilomoe.data.prepare.kuaivideo import kuaivideo_schema, prepare_kuaivideo
from torchrec_hilomoe.data.prepare.microvideo import prepare_microvideo
from torchrec_hilomoe.data.prepare.taobao_ad import prepare_taobao_ad

ROWS, TEST_ROWS = 400, 60
AMAZON = ({"user_id": 30, "item_id": 90, "cate_id": 7}, {"item_history": 90, "cate_history": 7})
KUAI = ({"user_id": 12, "item_id": 60}, {"pos_items": 60, "neg_items": 60})
MICRO = (
    {"user_id": 12, "item_id": 60, "cate_id": 9},
    {"clicked_items": 60, "clicked_categories": 9},
)
TAOBAO_COLUMNS = {name: 300 for name in taobao_ad.RAW_COLUMNS if name not in ("price", "clk")}


def amazon_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rows = x1_rows(count, *AMAZON, label="label", seed=seed, longest=130)
    if seed:  # rows to test on have items of their own
        rows[0] |= {"item_id": 1000, "item_history": "5^1001^1", "cate_history": "1^1^1"}
    return rows


def taobao_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rows = x1_rows(
        count,
        TAOBAO_COLUMNS,
        {"cate_his": 300, "brand_his": 300, "btag_his": 4},
        label="clk",
        seed=seed,
        longest=50,
        extra={"btag": 1, "price": 0.25},
    )
    for row in rows:  # in a history 0 is no event
        for name in ("cate_his", "brand_his", "btag_his"):
            row[name] = "^".join(str(int(event) + 1) for event in row[name].split("^") if event)
    return rows


def read(out, split):
    return pq.read_table(out / split).to_pylist()


def report(out):
    return json.loads((out / "report.json").read_text())


def sizes_by_fuxictr(path, columns, *, shared, min_count):
    """Vocabulary sizes of columns, as the benchmark's own preprocessing counts them."""
    features = []
    for name in columns:
        sequence = name in shared
        feature = {"name": name, "active": True, "dtype": "str"}
        feature |= {"type": "sequence" if sequence else "categorical"}
        if sequence:
            feature |= {"splitter": "^", "max_len": 5, "padding": "pre"}
            feature |= {"share_embedding": shared[name]}
        features.append(feature)
    return fuxictr_preprocessing(path, features, min_count)


@pytest.fixture
def amazon(tmp_path):
    write_csv(tmp_path / "raw" / "train.csv", amazon_rows(ROWS, 0))
    write_csv(tmp_path / "raw" / "test.csv", amazon_rows(TEST_ROWS, 1))
    return tmp_path / "raw"


def test_amazon_counts_as_the_benchmark_does(amazon, tmp_path):
    prepare_amazon_electronics(raw=str(amazon), out=str(tmp_path / "out"), valid_percent=0)
    sizes = sizes_by_fuxictr(
        amazon / "train.csv",
        ["item_id", "cate_id", "item_history", "cate_history"],
        shared={"item_history": "item_id", "cate_history": "cate_id"},
        min_count=1,
    )
    tables = load_schema(str(tmp_path / "out")).tables
    assert tables == {"item": sizes["item_id"], "category": sizes["cate_id"]}


def test_taobao_counts_as_the_benchmark_does(tmp_path):
    write_csv(tmp_path / "train.csv", taobao_rows(ROWS, 0))
    write_csv(tmp_path / "test.csv", taobao_rows(TEST_ROWS, 1))
    prepare_taobao_ad(raw=str(tmp_path), out=str(tmp_path / "out"), valid_percent=0)
    names = [*TAOBAO_COLUMNS, "btag", "cate_his", "brand_his", "btag_his"]
    sizes = sizes_by_fuxictr(
        tmp_path / "train.csv", names, shared=taobao_ad.SEQUENCES, min_count=10
    )
    tables = load_schema(str(tmp_path / "out")).tables
    assert tables == {name: sizes[name] for name in tables}
    assert 12 < tables["brand"] < 250  # some values are rare, some are not


def test_amazon_rows_are_those_of_the_files(amazon, tmp_path):
    out = tmp_path / "out"
    prepare_amazon_electronics(raw=str(amazon), out=str(out), valid_percent=20)
    item, cate = (
        {
            row["value"]: row["id"]
            for row in pq.read_table(out / "vocabularies" / f"{table}.parquet").to_pylist()
        }
        for table in ("item", "category")
    )
    tables = load_schema(str(out)).tables

    def encoded(row):
        items, cates = (
            [int(x) for x in str(row[name]).split("^") if x][:100]
            for name in ("item_history", "cate_history")
        )
        return {
            "item_id": item.get(row["item_id"], tables["item"] - 1),
            "cate_id": cate.get(row["cate_id"], tables["category"] - 1),
            "item_history": [item.get(x, tables["item"] - 1) for x in items],
            "cate_history": [cate.get(x, tables["category"] - 1) for x in cates],
            "label": row["label"],
            "user_id": row["user_id"],
        }

    assert read(out, "test") == [encoded(row) for row in amazon_rows(TEST_ROWS, 1)]
    train, valid = read(out, "train"), read(out, "valid")
    want = [encoded(row) for row in amazon_rows(ROWS, 0)]
    assert sorted(map(repr, train + valid)) == sorted(map(repr, want))
    assert train != [row for row in want if row in train]  # in a random order
    assert not {row["user_id"] for row in train} & {row["user_id"] for row in valid}
    assert 0.05 * ROWS < len(valid) < 0.5 * ROWS
    found = report(out)
    assert found["options"]["held_out_by"] == "group"
    assert (found["rows_read"], found["rows_kept"], found["rows_bad"]) == (460, 460, {})
    unknown = sum(row["item_id"] == tables["item"] - 1 for row in read(out, "test"))
    unknown += sum(row["item_history"].count(tables["item"] - 1) for row in read(out, "test"))
    rows = read(out, "test")
    assert found["unknown"]["test"]["item"] == {
        "unknown_ids": unknown,
        "ids": sum(1 + len(row["item_history"]) for row in rows),
        "rows_with_unknown": sum(
            tables["item"] - 1 in (row["item_id"], *row["item_history"]) for row in rows
        ),
        "rows": TEST_ROWS,
    }
    assert unknown > 0


def test_the_raw_layout_gives_the_same_rows(tmp_path):
    for name, count, seed in (("train", ROWS, 0), ("test", TEST_ROWS, 1)):
        rows = taobao_rows(count, seed)
        write_csv(tmp_path / "x1" / f"{name}.csv", rows)
        lines = alimama_rows(rows, taobao_ad.RAW_COLUMNS)
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    prepare_taobao_ad(raw=str(tmp_path / "x1"), out=str(tmp_path / "a"))
    prepare_taobao_ad(
        raw=str(tmp_path), out=str(tmp_path / "b"), train="train.txt", test="test.txt"
    )
    assert load_schema(str(tmp_path / "a")) == load_schema(str(tmp_path / "b"))
    for split in ("train", "valid", "test"):
        assert read(tmp_path / "a", split) == read(tmp_path / "b", split)
        assert read(tmp_path / "a", split)[0]["price"] == 0.25


def test_lists_that_lack_entries_end_together(tmp_path):
    found = taobao_rows(60, 0)
    found[7] |= {"cate_his": "5^6^7", "brand_his": "8^9", "btag_his": ""}
    write_csv(tmp_path / "train.csv", taobao_rows(ROWS, 0))
    write_csv(tmp_path / "test.csv", found)
    prepared = prepare_taobao_ad(raw=str(tmp_path), out=str(tmp_path / "out"))
    assert prepared.rows_kept == ROWS + 60
    tables = load_schema(str(tmp_path / "out")).tables
    ids = {
        row["value"]: row["id"]
        for row in pq.read_table(tmp_path / "out" / "vocabularies" / "brand.parquet").to_pylist()
    }
    row, unknown = read(tmp_path / "out", "test")[7], tables["brand"] - 1
    assert row["brand_his"] == [unknown, ids.get(8, unknown), ids.get(9, unknown)]
    assert len(row["cate_his"]) == 3
    assert row["btag_his"] == [tables["btag"] - 1] * 3


def test_layouts_are_not_mixed(tmp_path):
    rows = taobao_rows(5, 0)
    write_csv(tmp_path / "train.csv", rows)
    (tmp_path / "test.csv").write_text("\n".join(alimama_rows(rows, taobao_ad.RAW_COLUMNS)))
    with pytest.raises(DataError, match=r"train\.csv and .*test\.csv one has a header.*--train"):
        prepare_taobao_ad(raw=str(tmp_path), out=str(tmp_path / "out"))


@pytest.fixture
def kuai(tmp_path):
    raw = tmp_path / "raw"
    extra = {"is_like": 0, "is_follow": 0}
    write_csv(raw / "train.csv", x1_rows(ROWS, *KUAI, label="is_click", extra=extra))
    write_csv(raw / "test.csv", x1_rows(TEST_ROWS, *KUAI, label="is_click", seed=1, extra=extra))
    return raw


def test_kuaivideo_has_ids_by_count_and_a_vector_for_every_video(kuai, tmp_path):
    out = tmp_path / "out"
    vectors = write_vectors(kuai / "item_visual_emb_dim64.h5", range(70))
    prepare_kuaivideo(raw=str(kuai), out=str(out), valid_percent=10)
    schema = load_schema(str(out))
    # Counted without the rows that are held out, the latest.
    write_csv(tmp_path / "kept.csv", x1_rows(ROWS, *KUAI, label="is_click")[: ROWS * 9 // 10])
    sizes = sizes_by_fuxictr(
        tmp_path / "kept.csv",
        ["user_id", "item_id", "pos_items", "neg_items"],
        shared={"pos_items": "item_id", "neg_items": "item_id"},
        min_count=10,
    )
    assert schema.tables == {"item": sizes["item_id"], "user": sizes["user_id"], "item_emb": 72}
    assert schema == kuaivideo_schema(
        users=schema.tables["user"], items=schema.tables["item"], covers=72, width=8
    )
    stored = np.load(out / "vectors" / "item_emb.npy")
    assert np.array_equal(stored[1:71], vectors)
    assert not stored[[0, 71]].any()
    raw_rows = x1_rows(ROWS, *KUAI, label="is_click")
    by_time = {row["timestamp"]: row for row in raw_rows}
    train, valid = read(out, "train"), read(out, "valid")
    for row in train + valid:
        raw = by_time[row["timestamp"]]
        assert row["item_emb"] == raw["item_id"] + 1
        assert row["group"] == raw["user_id"]
        assert row["label"] == raw["is_click"]
        assert row["pos_items_emb"] == [int(x) + 1 for x in raw["pos_items"].split("^") if x]
        assert len(row["pos_items"]) == len(row["pos_items_emb"])
    border = report(out)["notes"]["validation_begins_at"]
    assert max(row["timestamp"] for row in train) < border
    assert min(row["timestamp"] for row in valid) >= border
    assert len(valid) == ROWS // 10
    assert ParquetSource(str(out), "train").schema == schema


def test_microvideos_are_their_vectors(tmp_path):
    raw = tmp_path / "raw"
    write_csv(raw / "train.csv", x1_rows(ROWS, *MICRO, label="is_click"))
    write_csv(raw / "test.csv", x1_rows(TEST_ROWS, *MICRO, label="is_click", seed=1))
    write_vectors(raw / "item_image_emb_dim64.h5", range(59, -1, -1))
    prepare_microvideo(raw=str(raw), out=str(tmp_path / "out"))
    tables = load_schema(str(tmp_path / "out")).tables
    sizes = sizes_by_fuxictr(
        raw / "train.csv",
        ["user_id", "cate_id", "clicked_categories"],
        shared={"clicked_categories": "cate_id"},
        min_count=1,
    )
    want = {"item": 62, "category": sizes["cate_id"], "user": sizes["user_id"]}
    assert tables == want
    row, raw_row = (
        read(tmp_path / "out", "test")[7],
        x1_rows(8, *MICRO, label="is_click", seed=1)[7],
    )
    assert row["item_id"] == 60 - raw_row["item_id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"neither item_visual_emb_dim64\.h5 nor .*name their folder with --raw"),
        (b"text", r"item_visual_emb_dim64\.h5 cannot be read as keys and vectors"),
        ([1, 1], r"has a key twice"),
    ],
)
def test_wrong_vectors_are_named(kuai, tmp_path, content, message):
    path = kuai / "item_visual_emb_dim64.h5"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        write_vectors(path, content)
    with pytest.raises(DataError, match=message):
        prepare_kuaivideo(raw=str(kuai), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_vector_that_is_not_finite_is_named(kuai, tmp_path):
    path = kuai / "item_visual_emb_dim64.h5"
    vectors = np.zeros((70, 8), dtype=np.float32)
    vectors[3, 2] = np.nan
    with h5py.File(path, "w") as file:
        file.create_dataset("key", data=list(range(100, 170)))
        file.create_dataset("value", data=vectors)
    with pytest.raises(DataError, match="the vector of 103 is not finite"):
        prepare_kuaivideo(raw=str(kuai), out=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
