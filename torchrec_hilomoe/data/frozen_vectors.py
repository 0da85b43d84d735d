"""Vectors of frozen tables, as they lie in a prepared folder.

Shape legend:
    N  rows of a table
    W  width of its vectors
"""

import numpy as np

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["open_vectors"]

AGAIN = "Prepare the data again."


def open_vectors(schema: Schema, table: str, folder: str) -> np.ndarray:
    """Map the vectors of a frozen table into memory: ``(N, W)`` float32, read when used.

    Raises:
        DataError: If the file is missing or has another shape than the schema says.
    """
    given = schema.frozen[table]
    path = f"{folder.rstrip('/')}/{given.file}"
    try:
        # A remote file is fetched once, into the path manager's cache.
        vectors_NW = np.load(path_manager.get_local_path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the vectors of frozen table {table!r} cannot be read from {path} ({error}). {AGAIN}"
        ) from error
    wanted = (schema.tables[table], given.width)
    if vectors_NW.shape != wanted or vectors_NW.dtype != np.float32:
        raise DataError(
            f"{path} holds {vectors_NW.dtype} of shape {vectors_NW.shape}, the schema wants "
            f"float32 of shape {wanted} for frozen table {table!r}. {AGAIN}"
        )
    return vectors_NW
