"""Raw values become ids: looked up in a vocabulary, hashed, or ids already.

Shape legend:
    N  values that are asked about
    V  values of the vocabulary; value ``v`` has id ``v + 1``
"""

from abc import ABC, abstractmethod

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.hashing import hash64, hash_ids
from torchrec_hilomoe.data.prepare.arrow import call

__all__ = ["Encoder", "Hashed", "Ids", "Numbers", "Texts", "encoder_of"]

SPARSE = 8  # a direct table may have so many places for each value, and at least the next number
DIRECT = 1 << 24


class Encoder(ABC):
    """Gives values of one table their ids."""

    @abstractmethod
    def encode(self, values: pa.Array) -> np.ndarray:
        """Return the id of each value, ``(N,)`` int64; a null is unknown."""


class Ids(Encoder):
    """Values that are ids already; whoever reads the data checks their range."""

    def encode(self, values: pa.Array) -> np.ndarray:
        """Return the values; a null is 0."""
        return pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.int64)


class Hashed(Encoder):
    """Any value has a row, which it may share.

    Args:
        rows: Of the table.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def encode(self, values: pa.Array) -> np.ndarray:
        """Return the row of each value's hash; a null is 0."""
        return hash_ids(values, self._rows)


class Numbers(Encoder):
    """A vocabulary of whole numbers.

    Args:
        values_V: Each once.
        unknown: The id of all others.
    """

    def __init__(self, values_V: np.ndarray, unknown: int) -> None:
        self._unknown = unknown
        span = int(values_V.max()) + 1 if len(values_V) else 0
        small = span <= max(SPARSE * len(values_V), DIRECT)
        self._direct = small and (not len(values_V) or values_V.min() >= 0)
        if self._direct:
            self._ids = np.full(span + 1, unknown, dtype=np.int64)
            self._ids[values_V] = np.arange(1, len(values_V) + 1)
        else:
            order = np.argsort(values_V)
            self._values, self._ids = values_V[order], order + 1

    def encode(self, values: pa.Array) -> np.ndarray:
        """Look each value up."""
        wanted_N = pc.fill_null(values, -1).to_numpy(zero_copy_only=False)
        if self._direct:
            last = len(self._ids) - 1  # a place that no value has
            # Seen as unsigned, a negative value is a huge one.
            return self._ids[np.minimum(wanted_N.view(np.uint64), np.uint64(last))]
        at_N = np.minimum(np.searchsorted(self._values, wanted_N), len(self._values) - 1)
        found_N = self._values[at_N] == wanted_N
        found_N &= values.is_valid().to_numpy(zero_copy_only=False)
        return np.where(found_N, self._ids[at_N], self._unknown)


class Texts(Encoder):
    """A vocabulary of texts, found by their hashes and then compared.

    Args:
        values: Each once.
        unknown: The id of all others.
    """

    def __init__(self, values: pa.Array, unknown: int) -> None:
        self._unknown = unknown
        hashes_V = hash64(values)
        order = np.argsort(hashes_V, kind="stable")
        self._hashes, self._ids = hashes_V[order], order + 1
        self._texts = pc.cast(values, pa.large_string()).take(pa.array(order))
        # Among millions of values the chance of one pair is below one in a million.
        assert (self._hashes[1:] != self._hashes[:-1]).all(), "two values share a hash"

    def encode(self, values: pa.Array) -> np.ndarray:
        """Look each value up."""
        if not len(self._hashes):
            return np.full(len(values), self._unknown, dtype=np.int64)
        # Most values of a column occur many times.
        coded = call("dictionary_encode", values)
        texts = pc.cast(coded.dictionary, pa.large_string())
        hashes = hash64(texts)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = pc.fill_null(call("equal", self._texts.take(pa.array(at)), texts), False)
        ids = np.where(same.to_numpy(zero_copy_only=False), self._ids[at], self._unknown)
        codes_N = pc.fill_null(coded.indices, len(ids)).to_numpy(zero_copy_only=False)
        return np.append(ids, self._unknown)[codes_N]


def encoder_of(values: pa.Array, unknown: int) -> Encoder:
    """Return the encoder of a vocabulary; value ``v`` of it has id ``v + 1``."""
    if pa.types.is_integer(values.type):
        return Numbers(pc.cast(values, pa.int64()).to_numpy(zero_copy_only=False), unknown)
    return Texts(values, unknown)
