"""A store that the user registers serves for raw files, prepared folders and reading them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.memory_store import MemoryStore
from tests.helpers.raw_logs import write_csv, write_vectors, x1_rows
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import load_schema, ParquetSource
from torchrec_hilomoe.data.prepare.describe import describe
from torchrec_hilomoe.data.prepare.describe_plots import draw
from torchrec_hilomoe.data.prepare.kuaivideo import prepare_kuaivideo
from torchrec_hilomoe.data.prepare.movielens import prepare_movielens
from torchrec_hilomoe.embeddings.frozen import load_frozen_tables
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.runtime.paths import (
    explain_unwritten,
    make_folders_for,
    open_binary,
    open_text,
    path_manager,
    remove_tree,
    rename,
    write_text,
)

OUT = "memory://prepared/kuai"


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    handler = MemoryStore()
    path_manager.register_handler(handler)
    yield handler
    del path_manager._path_handlers["memory://"]


@pytest.fixture
def kuai(store, tmp_path) -> MemoryStore:
    """The raw files of KuaiVideo, in the store alone."""
    columns, histories = {"user_id": 9, "item_id": 40}, {"pos_items": 40, "neg_items": 40}
    for name, rows, seed in (("train", 200, 0), ("test", 30, 1)):
        path = tmp_path / f"{name}.csv"
        write_csv(path, x1_rows(rows, columns, histories, label="is_click", seed=seed))
        store.objects[f"memory://raw/{path.name}"] = path.read_bytes()
        path.unlink()
    write_vectors(tmp_path / "v.h5", range(50))
    store.objects["memory://raw/item_visual_emb_dim64.h5"] = (tmp_path / "v.h5").read_bytes()
    (tmp_path / "v.h5").unlink()
    return store


def test_raw_files_are_prepared_from_the_store_into_it(kuai, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepare_kuaivideo(raw="memory://raw", out=OUT)
    assert list(tmp_path.iterdir()) == []  # not even scratch files stay on the disk
    assert {path.removeprefix(f"{OUT}/") for path in kuai.objects if path.startswith(OUT)} == {
        "schema.json",
        "report.json",
        "_SUCCESS",
        "vectors/item_emb.npy",
        *(f"vocabularies/{table}.parquet" for table in ("item", "item_emb", "user")),
        *(f"{split}/part-00000.parquet" for split in ("train", "valid", "test")),
    }
    rows = sum(batch.weights.numel() for batch in Loader(_source("test"), batch_size=8, epochs=1))
    assert rows == 30
    sparse = SparseArch(load_schema(OUT), 4, torch.device("cpu"))
    load_frozen_tables(sparse, OUT)
    (table,) = sparse.frozen_tables
    assert np.abs(table[1:51].detach().numpy()).min() > 0
    with pytest.raises(DataError, match=r"memory://prepared/kuai holds prepared data already"):
        prepare_kuaivideo(raw="memory://raw", out=OUT)
    before = kuai.objects[f"{OUT}/report.json"]
    prepare_kuaivideo(raw="memory://raw", out=OUT, overwrite=True)
    assert kuai.objects[f"{OUT}/report.json"] == before
    assert not [path for path in kuai.objects if "partial" in path or "old" in path]


def _source(split: str) -> ParquetSource:
    return ParquetSource(OUT, split)


def test_a_folder_in_the_store_is_described_and_drawn(kuai):
    prepare_kuaivideo(raw="memory://raw", out=OUT)
    found = describe(OUT)
    assert found.splits["train"].rows + found.splits["valid"].rows == 200
    files = draw(found, "memory://plots")
    assert all(kuai.objects[path].startswith(b"\x89PNG") for path in files)


def test_errors_name_what_is_in_the_store(kuai):
    with pytest.raises(DataError, match="there is no folder memory://nowhere"):
        prepare_kuaivideo(raw="memory://nowhere", out=OUT)
    with pytest.raises(DataError, match=r"no data folder memory://prepared/kuai"):
        _source("train")
    kuai.objects["memory://raw/train.csv"] = b"timestamp,user_id\n1,2\n"
    with pytest.raises(DataError, match=r"memory://raw/train\.csv lacks the columns item_id"):
        prepare_kuaivideo(raw="memory://raw", out=OUT)
    assert not [path for path in kuai.objects if path.startswith("memory://prepared")]


def test_a_data_set_in_memory_is_written_to_the_store(store, tmp_path: Path):
    ratings = [f"1::{movie}::{1 + movie % 5}::{movie}" for movie in range(1, 21)]
    raw = {
        "ratings.dat": "\n".join(ratings),
        "movies.dat": "1::One (1999)::Drama\n",
        "users.dat": "1::F::25::3::90210\n",
    }
    for name, text in raw.items():
        store.objects[f"memory://ml/{name}"] = text.encode()
    report = prepare_movielens(raw="memory://ml", out="memory://out")
    assert report.rows_kept == 20
    assert ParquetSource("memory://out", "train").block_rows == (16,)


def test_files_are_renamed_and_removed_in_the_store(store):
    with open_text("memory://a/b/c.txt", "w") as sink:
        sink.write("grüße")
    with open_binary("memory://a/d.bin", "wb") as sink:
        sink.write(b"\0")
    rename("memory://a", "memory://z")
    with open_text("memory://z/b/c.txt") as source:
        assert source.read() == "grüße"
    remove_tree("memory://z")
    assert store.objects == {}
    with pytest.raises(OSError, match="could not rename memory://a to memory://z"):
        rename("memory://a", "memory://z")


def test_folders_are_made_for_files_to_come(store, tmp_path):
    out, remote = tmp_path / "a" / "b" / "plan.json", "memory://plans/plan.json"
    make_folders_for({"--out": str(out), "--far": remote, "--plot": None, "--here": "plan.json"})
    assert out.parent.is_dir()
    write_text(str(out), "x")
    write_text(remote, "y")
    assert (out.read_text(), store.objects[remote]) == ("x", b"y")
    make_folders_for({"--out": str(out)})
    assert out.read_text() == "x"
    with pytest.raises(ValueError, match=r"--out .*/a is a folder\. Name a file"):
        make_folders_for({"--out": str(tmp_path / "a")})
    with pytest.raises(
        ValueError, match=r"--plot /proc/x\.png cannot be written: (?!.*tmp).*\. Name"
    ):
        make_folders_for({"--plot": "/proc/x.png"})
    with pytest.raises(ValueError, match=r"--plot .*folder cannot be made: .*plan\.json is a file"):
        make_folders_for({"--plot": str(out / "below.png")})


def test_a_file_that_fails_when_it_is_written_is_named_with_its_option():
    full = "/dev/full"
    want = r"--plot /dev/full cannot be written: No space left on device\. Name another place"
    with (
        pytest.raises(ValueError, match=want),
        explain_unwritten("--plot", full),
        open_text(full, "w") as sink,
    ):
        sink.write("x")
