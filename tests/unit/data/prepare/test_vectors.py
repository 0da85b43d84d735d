"""Vectors in every format, in the order of their keys, and without the extra that reads HDF5."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.raw_logs import write_vectors
from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare import vectors as vectors_module
from torchrec_hilomoe.data.prepare.folder import prepared_folder
from torchrec_hilomoe.data.prepare.vectors import Vectors
from torchrec_hilomoe.data.prepare.vectors import write_vectors as write_table

KEYS = [7, 3, 11, 5, 2]


def written(path) -> np.ndarray:
    values = np.arange(20, dtype=np.float32).reshape(5, 4)
    if path.suffix == ".h5":
        return write_vectors(path, KEYS, width=4)
    if path.suffix == ".npz":
        np.savez(path, key=np.array([f"k{key}" for key in KEYS]), value=values)
    else:
        pq.write_table(pa.table({"key": KEYS, "value": list(values)}), path)
    return values


@pytest.mark.parametrize("name", ["v.h5", "v.npz", "v.parquet"])
def test_a_table_has_zeros_around_the_vectors(tmp_path, monkeypatch, name):
    monkeypatch.setattr(vectors_module, "ROWS_AT_ONCE", 2)
    want = written(tmp_path / name)
    found = Vectors(str(tmp_path / name))
    assert found.width == 4
    assert found.keys.to_pylist() == ([f"k{key}" for key in KEYS] if "npz" in name else KEYS)
    with prepared_folder(str(tmp_path / "out"), overwrite=False) as folder:
        write_table(folder, "cover", found, rows=8)
    stored = np.load(tmp_path / "out" / "vectors" / "cover.npy")
    assert stored.dtype == np.float32
    assert np.array_equal(stored, np.concatenate([np.zeros((1, 4)), want, np.zeros((2, 4))]))


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    written(tmp_path / "v.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r'v\.h5 wants h5py: pip install "h5py>=3.10,<4"'):
        Vectors(str(tmp_path / "v.h5"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"key": np.arange(3), "value": np.zeros((2, 4))}, r"3 keys and vectors of shape \(2, 4\)"),
        ({"key": np.arange(2), "value": np.zeros(2)}, r"2 keys and vectors of shape \(2,\)"),
        ({"keys": np.arange(2), "value": np.zeros((2, 4))}, r"cannot be read as keys and vectors"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, content, message):
    np.savez(tmp_path / "v.npz", **content)
    with pytest.raises(DataError, match=message):
        Vectors(str(tmp_path / "v.npz"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"value": [[2.0] * 4, [3.0] * 6, [4.0] * 2]}, "the vector of 2 has width 6, the first 4"),
        ({"value": [[2.0] * 4, None, [4.0] * 4]}, "the vector of 2 is missing"),
        ({"value": [None, [3.0] * 4, [4.0] * 4]}, "the vector of 1 is missing"),
        ({"key": [1, None, 3]}, "key 2 of 3 is missing"),
    ],
    ids=["unequal", "null", "null first", "key"],
)
def test_every_key_of_parquet_has_a_vector_of_one_width(tmp_path, columns, message):
    whole = {"key": [1, 2, 3], "value": [[2.0] * 4, [3.0] * 4, [4.0] * 4], **columns}
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float32())):
        types = pa.schema([("key", pa.int64()), ("value", kind)])
        pq.write_table(pa.table(whole, types), tmp_path / "v.parquet")
        with pytest.raises(DataError, match=rf"v\.parquet: {message}; "):
            Vectors(str(tmp_path / "v.parquet"))


def test_missing_vectors_of_a_fixed_width_are_named(tmp_path):
    values = pa.array([[2.0] * 4, None], pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"key": [1, 2], "value": values}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"v\.parquet: the vector of 2 is missing; "):
        Vectors(str(tmp_path / "v.parquet"))


def test_a_vector_that_is_not_finite_is_named_alone(tmp_path):
    np.savez(tmp_path / "v.npz", key=np.arange(2), value=np.array([[0.0], [np.nan]]))
    with pytest.raises(DataError, match=r"v\.npz: the vector of 1 is not finite; mend it\.$"):
        list(Vectors(str(tmp_path / "v.npz")).blocks())
