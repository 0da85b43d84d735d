"""Files of vocabularies: what one must be to belong to a schema, and whose bucket a number is.

Shape legend:
    N  numbers
    V  values of a vocabulary; those of a bucketed one are the least numbers of its buckets
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["bucket_ids", "read_vocabulary", "vocabulary_faults"]


def bucket_ids(numbers_N: np.ndarray, least_V: np.ndarray, unknown: int) -> np.ndarray:
    """Return the id of the bucket that each number is in, int64; NaN is unknown.

    Args:
        numbers_N: float64.
        least_V: The least number of each bucket, rising; the first is minus infinity.
        unknown: The id of what is no number.

    Example:
        >>> least = np.array([-np.inf, 0.5, 2.0])
        >>> bucket_ids(np.array([-7.0, 0.5, 1.9, 1e9, np.nan]), least, 0).tolist()
        [1, 2, 2, 3, 0]
    """
    ids_N = np.searchsorted(least_V, numbers_N, side="right")
    return np.where(np.isnan(numbers_N), unknown, ids_N)


def read_vocabulary(path: str) -> pa.Table:
    """Read the columns ``value`` and ``id`` of a vocabulary's file.

    Raises:
        DataError: If it is no Parquet file, or lacks one of them.
    """
    try:
        with open_binary(path) as source:
            return pq.read_table(source, columns=["value", "id"]).select(["value", "id"])
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read as a vocabulary, with columns value and id ({reason})."
        ) from error


def vocabulary_faults(vocabulary: pa.Table, schema: Schema, table: str) -> Iterator[str]:
    """Say what is wrong with a table's vocabulary: each value once, ids from 1 on, the right size.

    Args:
        vocabulary: Columns ``value`` and ``id``.
        schema: Says how many rows the table has, and which of them is of unknown values.
        table: Its name.

    Yields:
        A fault in words; none if the vocabulary fits.

    """
    try:
        ids = vocabulary["id"].cast(pa.int64()).to_pylist()
    except pa.ArrowException:
        yield f"ids are {vocabulary['id'].type}, not whole numbers"
        return
    if sorted(ids, key=lambda it: it or 0) != list(range(1, len(ids) + 1)):
        yield f"ids are not 1 to {len(ids)}, each once"
    if len(vocabulary["value"].unique()) != len(ids):
        yield "a value occurs twice"
    if schema.vocabularies[table].kind == "bucketed":
        try:
            least_V = vocabulary.sort_by("id")["value"].cast(pa.float64()).to_numpy()
        except pa.ArrowException:
            yield f"values of buckets are {vocabulary['value'].type}, not numbers"
            return
        if not len(least_V) or least_V[0] != -np.inf or not (np.diff(least_V) > 0).all():
            yield "values are no least numbers of buckets, rising from minus infinity"
    rows = schema.tables[table]
    wanted = len(ids) + (2 if schema.vocabularies[table].unknown == "last" else 1)
    if wanted != rows:
        yield f"{len(ids)} values want {wanted} rows of table {table!r}, schema says {rows}"
