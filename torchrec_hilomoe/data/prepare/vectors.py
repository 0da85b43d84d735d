"""Vectors that come with a data set become the file of a frozen table.

Shape legend:
    N  vectors
    W  width
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib import format as npy

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.folder import PreparedFolder, vectors_file
from torchrec_hilomoe.runtime.paths import open_binary, path_manager

__all__ = ["Vectors", "write_vectors"]

ROWS_AT_ONCE = 1 << 16


class Vectors:
    """A file of keys and vectors: HDF5 or ``.npz`` with ``key`` and ``value``, or Parquet.

    Args:
        path: Ends in ``.h5``, ``.npz`` or ``.parquet``.

    Raises:
        DataError: If it is unreadable, keys repeat, there are not as many as vectors, or vectors
            are missing or of several widths.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with self._open() as file:
            self.keys = _keys(file["key"])
            shape = file["value"].shape
        if len(shape) != 2 or shape[0] != len(self.keys):
            raise DataError(f"{path} has {len(self.keys)} keys and vectors of shape {shape}.")
        self.width = int(shape[1])
        if len(self.keys.unique()) != len(self.keys):
            raise DataError(f"{path} has a key twice; keep one vector of each.")

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the vectors in the order of the keys, float32, many at a time.

        Raises:
            DataError: If one is not finite.
        """
        with self._open() as file:
            for start in range(0, len(self.keys), ROWS_AT_ONCE):
                block_NW = np.asarray(file["value"][start : start + ROWS_AT_ONCE], np.float32)
                wrong_N = ~np.isfinite(block_NW).all(axis=1)
                if wrong_N.any():
                    key = self.keys[start + int(np.flatnonzero(wrong_N)[0])]
                    raise DataError(f"{self.path}: the vector of {key} is not finite; mend it.")
                yield block_NW

    @contextmanager
    def _open(self) -> Iterator[Any]:
        # KeyError: there is no such dataset in the file.
        errors = (OSError, KeyError, ValueError, pa.ArrowException, zipfile.BadZipFile)
        try:
            if self.path.endswith(".h5"):
                import h5py  # an extra, and slow to import

                with open_binary(self.path) as raw, h5py.File(raw, "r") as file:
                    yield file
            elif self.path.endswith(".npz"):
                with open_binary(self.path) as raw, np.load(raw, allow_pickle=False) as file:
                    yield file
            else:
                with open_binary(self.path) as raw:
                    table = pq.read_table(raw, columns=["key", "value"])
                    keys, values = (table[name].combine_chunks() for name in table.column_names)
                    width = _width(self.path, keys, values)
                    flat = values.flatten().to_numpy(zero_copy_only=False)
                    yield {
                        "key": keys.to_numpy(zero_copy_only=False),
                        "value": flat.reshape(len(values), width),
                    }
        except DataError:  # which is a ValueError, and says what is wrong
            raise
        except ModuleNotFoundError as error:
            raise DataError(f'{self.path} wants h5py: pip install "h5py>=3.10,<4".') from error
        except errors as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.path} cannot be read as keys and vectors ({reason}). Get a whole copy."
            ) from error


def write_vectors(folder: PreparedFolder, table: str, vectors: Vectors, rows: int) -> None:
    """Write a frozen table: zeros for padding and "unknown", else the vectors.

    Args:
        folder: Where to.
        table: Its name.
        vectors: The first of which has id 1.
        rows: Of the table.
    """
    path = f"{folder.path}/{vectors_file(table)}"
    path_manager.mkdirs(path.rpartition("/")[0])
    zeros_1W = np.zeros((1, vectors.width), dtype=np.float32)
    with open_binary(path, "wb") as sink:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, vectors.width)}
        npy.write_array_header_1_0(sink, header)
        sink.write(zeros_1W.tobytes())
        for block_NW in vectors.blocks():
            sink.write(np.ascontiguousarray(block_NW).tobytes())
        sink.write(zeros_1W.tobytes() * (rows - 1 - len(vectors.keys)))


def _width(path: str, keys: pa.Array, values: pa.Array) -> int:
    """Return the width that all lists have; flattened, others would be those of other keys."""
    if keys.null_count:
        place = keys.is_null().index(True).as_py()
        raise DataError(f"{path}: key {place + 1} of {len(keys)} is missing; give it, or drop it.")
    widths = pc.call_function("list_value_length", [values])
    if widths.null_count:
        key = keys[widths.is_null().index(True).as_py()]
        raise DataError(f"{path}: the vector of {key} is missing; give it, or drop the key.")
    widths_N = widths.to_numpy(zero_copy_only=False)
    other_N = np.flatnonzero(widths_N != widths_N[:1])
    if len(other_N):
        at = int(other_N[0])
        raise DataError(
            f"{path}: the vector of {keys[at]} has width {widths_N[at]}, the first {widths_N[0]}; "
            "give all the same."
        )
    return int(widths_N[0]) if len(widths_N) else 0


def _keys(stored: Any) -> pa.Array:
    keys = np.asarray(stored[:])
    if keys.dtype.kind in "iu":
        return pa.array(keys.astype(np.int64))
    texts = [key.decode() if isinstance(key, bytes) else str(key) for key in keys.tolist()]
    return pa.array(texts, pa.string())
