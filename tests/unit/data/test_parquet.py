"""ParquetSource: blocks from files, and what a broken folder or file gets."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iopath.common.file_io import PathHandler

from tests.helpers.datasets import replace_column, row_ids, SCHEMA, toy_table, write_folder
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.runtime.paths import path_manager


@pytest.fixture
def folder(tmp_path):
    tables = [toy_table(25, seed=1), toy_table(0), toy_table(14, seed=2, first=25)]
    return write_folder(tmp_path / "set", {"train": tables})


def epoch(source, **changed):
    options: dict[str, Any] = {"prefetch": 0} | changed
    loader = Loader(source, batch_size=8, epochs=1, **options)
    return sorted(row for batch in loader for row in row_ids(batch))


def by_row_group(folder, *schema):
    """A source whose blocks are single row groups."""
    return ParquetSource(str(folder), "train", *schema, block_bytes=1)


def test_blocks_are_the_row_groups_of_all_files(folder):
    source = by_row_group(folder)
    assert [rows for rows in source.block_rows if rows] == [10, 10, 5, 10, 4]
    whole = pa.concat_tables([toy_table(25, seed=1), toy_table(14, seed=2, first=25)])
    blocks = [source.read(0, block) for block in range(len(source.block_rows))]
    assert pa.concat_tables(blocks) == whole.select(blocks[0].column_names)
    assert source.schema == SCHEMA


def test_reads_only_the_schemas_columns(folder):
    block = ParquetSource(str(folder), "train").read(0, 0)
    assert sorted(block.column_names) == sorted(SCHEMA.columns)
    fewer = replace(SCHEMA, dense=(), sequences=())
    assert sorted(ParquetSource(f"{folder}/", "train", fewer).read(0, 0).column_names) == sorted(
        fewer.columns
    )


def test_describes_file_and_row_group(folder):
    source = by_row_group(folder)
    last = len(source.block_rows) - 1
    assert source.describe(1).endswith("train/part-00000.parquet row group 1")
    assert source.describe(last).endswith("train/part-00002.parquet row group 1")


def test_an_epoch_reads_every_row(folder):
    assert epoch(ParquetSource(str(folder), "train")) == list(range(39))


@pytest.mark.parametrize("missing", ["schema.json", "_SUCCESS"])
def test_a_half_made_folder_is_named_with_the_remedy(folder, missing):
    (folder / missing).unlink()
    message = (
        rf"{folder} is not a whole data folder: {missing} is missing.*torchrec_hilomoe prepare"
    )
    with pytest.raises(DataError, match=message):
        ParquetSource(str(folder), "train", SCHEMA)


def test_missing_folders_and_files_are_named(folder):
    with pytest.raises(DataError, match=r"no data folder .*/nowhere\. .*torchrec_hilomoe prepare"):
        ParquetSource(f"{folder}/nowhere", "train")
    with pytest.raises(DataError, match=r"no folder .*/valid, so no valid rows"):
        ParquetSource(str(folder), "valid")
    (folder / "valid").mkdir()
    with pytest.raises(DataError, match=r"/valid has no \.parquet file"):
        ParquetSource(str(folder), "valid")


@pytest.mark.parametrize(("split", "does"), [("valid", "validates"), ("test", "tests")])
def test_a_split_without_rows_says_what_a_run_wants_them_for(folder, split, does):
    (folder / split).mkdir()
    pq.write_table(toy_table(0), folder / split / "part-00000.parquet")
    message = (
        rf"/{split} has no rows, and a run {does} by some\. .* a --{split}_percent above 0, or"
    )
    with pytest.raises(DataError, match=message):
        ParquetSource(str(folder), split)


def test_no_rows_to_train_on_are_refused(tmp_path):
    folder = write_folder(tmp_path / "set", {"train": [toy_table(0)]})
    with pytest.raises(DataError, match=r"/train has no rows\. Make it with"):
        ParquetSource(str(folder), "train")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"version": 1}', '{"version": 1, "candidate": 3}']
)
def test_a_file_that_is_no_schema_is_named(folder, text):
    (folder / "schema.json").write_text(text)
    with pytest.raises(DataError, match=r"/schema\.json is not a schema"):
        ParquetSource(str(folder), "train")


def test_wrong_columns_are_all_named(tmp_path):
    table = toy_table(3).drop_columns(["place"])
    table = replace_column(table, "item", pa.array(["a", "b", "c"]))
    table = replace_column(table, "clicks_item", pa.array([1, 2, 3]))
    table = replace_column(table, "tags", pa.array([[0.5], [], []]))
    table = replace_column(table, "price", pa.array([[1], [], []]))
    table = table.append_column("kind", table.column("kind"))
    folder = write_folder(tmp_path / "set", {"train": [table]})
    with pytest.raises(DataError, match=r"part-00000\.parquet") as caught:
        ParquetSource(str(folder), "train")
    for fault in (
        "column 'place' is missing",
        "column 'kind' occurs twice",
        "column 'item' is string, the schema wants an integer",
        "column 'clicks_item' is int64, the schema wants a list of integers",
        "column 'tags' is list<element: double>, the schema wants a list of integers",
        "column 'price' is list<element: int64>, the schema wants a number",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / "train" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=r"part-00000\.parquet is not a whole Parquet file"):
        ParquetSource(str(folder), "train")


def test_a_file_that_shrinks_after_opening_is_named(folder):
    source = by_row_group(folder)
    path = folder / "train" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"part-00000\.parquet row group 1 cannot be read"):
        source.read(0, 1)
    path.unlink()
    with pytest.raises(DataError, match=r"row group 0 cannot be read .*No such file"):
        source.read(0, 0)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_unreadable_block_ends_the_epoch_with_its_name(folder, prefetch):
    source = by_row_group(folder)
    path = folder / "train" / "part-00002.parquet"
    raw = bytearray(path.read_bytes())
    raw[10:60] = bytes(50)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"part-00002\.parquet row group 0 cannot be read"):
        epoch(source, prefetch=prefetch)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 10**6), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_are_found_or_harmless(tmp_path_factory, flips):
    """Page checksums find a flipped bit wherever in the pages; in the footer nothing can hang."""
    folder = write_folder(tmp_path_factory.mktemp("fuzz"), {"train": [toy_table(39)]})
    path = folder / "train" / "part-00000.parquet"
    raw = bytearray(path.read_bytes())
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    places = [place % (len(raw) - 4) + 4 for place, _ in flips]
    for place, (_, bit) in zip(places, flips, strict=True):
        raw[place] ^= 1 << bit
    good = ParquetSource(str(folder), "train")
    want = [good.read(0, block) for block in range(len(good.block_rows))]
    path.write_bytes(raw)
    with suppress(DataError):
        source = ParquetSource(str(folder), "train")
        assert len(epoch(source, max_bad_rows=39)) <= 39
        if max(places) < footer:
            assert [source.read(0, block) for block in range(len(want))] == want


MUTATIONS = {
    "item": st.sampled_from([None, -1, 20, 2**31 - 1]),
    "user": st.sampled_from([None, -1, 1000, 2**62]),
    "clicks_item": st.sampled_from([None, [], [1] * 9, [1, None], [-5], [99, 1]]),
    "clicks_kind": st.sampled_from([None, [], [1] * 9, [1, None], [7]]),
    "views_item": st.sampled_from([None, [1] * 1000, [None] * 3, [20]]),
    "tags": st.sampled_from([None, [], [8] * 50, [9]]),
    "price": st.sampled_from([None, float("nan"), float("inf"), -1e39]),
    "label": st.sampled_from([None, 2, -1, 127]),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 38), st.sampled_from(sorted(MUTATIONS))), max_size=8),
    st.data(),
)
def test_mutated_rows_are_counted_skips_and_the_rest_is_untouched(tmp_path_factory, where, data):
    rows = toy_table(39).to_pylist()
    for row, column in where:
        rows[row][column] = data.draw(MUTATIONS[column])
    mutated = pa.Table.from_pylist(rows, schema=toy_table(39).schema)
    folder = write_folder(tmp_path_factory.mktemp("fuzz"), {"train": [mutated]})
    source = ParquetSource(str(folder), "train")
    touched = {row for row, _ in where}
    got = epoch(source)
    assert set(range(39)) - touched <= set(got) <= set(range(39))
    assert len(got) == len(set(got))
    lost = 39 - len(got)
    if lost:
        with pytest.raises(DataError, match=rf"bad rows in one epoch.*max_bad_rows {lost - 1};"):
            epoch(source, max_bad_rows=lost - 1)


class StoreHandler(PathHandler):
    """A remote store of the tests' own: ``toystore://x`` is a local folder's ``x``."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self):
        return ["toystore://"]

    def _local(self, path):
        return str(self.root / path.removeprefix("toystore://"))

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._local(path), mode, **kwargs)  # noqa: SIM115 - the caller closes it

    def _isdir(self, path, **kwargs):
        return path_manager.isdir(self._local(path))

    def _isfile(self, path, **kwargs):
        return path_manager.isfile(self._local(path))

    def _ls(self, path, **kwargs):
        return path_manager.ls(self._local(path))


def test_reads_from_a_registered_store(folder):
    path_manager.register_handler(StoreHandler(folder.parent), allow_override=True)
    assert epoch(ParquetSource("toystore://set", "train")) == list(range(39))
