"""Files stay open between reads, a bounded number of them, and one reader has one."""

import gc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import toy_table
from torchrec_hilomoe.data.open_files import IDLE_FILES, OpenFiles


@pytest.fixture
def paths(tmp_path):
    names = [str(tmp_path / f"{index}.parquet") for index in range(IDLE_FILES + 3)]
    for name in names:
        pq.write_table(toy_table(2), name)
    return names


def opened_here(paths):
    """Which of the files this process holds open."""
    held = [entry.resolve() for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return [path for path in paths if Path(path).resolve() in held]


def read(files, path):
    with files.lend(path) as file:
        return file.read_row_group(0).num_rows


def test_a_file_that_came_back_is_lent_again(paths):
    files = OpenFiles()
    with files.lend(paths[0]) as first, files.lend(paths[0]) as second:
        assert second is not first
    with files.lend(paths[0]) as again:
        assert again in (first, second)


def test_a_bounded_number_stays_open_and_none_survives(paths):
    files = OpenFiles()
    assert [read(files, path) for path in paths] == [2] * len(paths)
    assert opened_here(paths) == paths[-IDLE_FILES:]
    del files
    gc.collect()
    assert opened_here(paths) == []


def test_a_file_that_failed_is_opened_again(paths):
    files = OpenFiles()
    with pytest.raises(RuntimeError, match="spoilt"), files.lend(paths[0]) as first:
        raise RuntimeError("spoilt")
    with files.lend(paths[0]) as second:
        assert second is not first
        assert second.read_row_group(0).num_rows == 2
