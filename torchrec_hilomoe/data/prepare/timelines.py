"""What lies before an event of a log, and what smaller files say of it.

Shape legend:
    N  ranges of neighbouring entries
    V  entries of all ranges together
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.prepare.encoding import encoder_of

__all__ = ["TRAIN_PERCENT", "VALID_PERCENT", "Lines", "earlier", "split_of"]

TRAIN_PERCENT, VALID_PERCENT = 80, 10  # of a log that is cut in the order of time


class Lines:
    """The lines of a smaller file by a key.

    Args:
        lines: Of a key that occurs twice, the first line counts.
        key: A column of whole numbers.
    """

    def __init__(self, lines: pl.DataFrame, key: str) -> None:
        first = lines.unique(key, keep="first", maintain_order=True)
        self._encoder = encoder_of(first[key], 0)
        facts = first.drop(key)
        self._facts = pl.concat([facts.clear(1), facts])

    def of(self, keys: pl.Series) -> pl.DataFrame:
        """Return what the line of each key says; nulls where there is none."""
        return self._facts[self._encoder.encode(keys)]


def split_of(user: str) -> pl.Expr:
    """Cut each user's events by time: 0 train, 1 valid, 2 test."""
    at, count = pl.int_range(pl.len()), pl.len().cast(pl.Int64)
    ends = [TRAIN_PERCENT, TRAIN_PERCENT + VALID_PERCENT]
    return pl.sum_horizontal((at >= count * end // 100).cast(pl.Int64) for end in ends).over(user)


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """Where each range lies in the result, and what it is taken from.

    Attributes:
        offsets: ``(N + 1,)`` int64: where each range begins in the result.
        index: ``(V,)`` int64: the entry that each place of the result is taken from.
    """

    offsets: np.ndarray
    index: np.ndarray

    def lists(self, values: pl.Series) -> pa.Array:
        """Take the ranges from ``values``: a list column with ``N`` rows."""
        offsets = pa.array(self.offsets, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values.to_numpy()[self.index]))


def earlier(ends_N: pl.Series, before_N: pl.Series, limit: int) -> _Ranges:
    """Return the last entries before each end.

    Args:
        ends_N: Where they end.
        before_N: How many there are.
        limit: How many are taken at most.

    Example:
        >>> earlier(pl.Series([3, 5]), pl.Series([3, 1]), 2).index.tolist()
        [1, 2, 4]
    """
    counts_N = np.minimum(before_N.to_numpy(), limit)
    offsets = np.concatenate([[0], np.cumsum(counts_N)])
    some_N = counts_N > 0
    counts, ends = counts_N[some_N], offsets[1:][some_N]
    starts = ends_N.to_numpy()[some_N] - counts
    # Every entry is one further than the last, except where a range begins: there it jumps. One
    # array of V and one pass over it: with more, the page faults cost more than the work.
    steps_V = np.ones(offsets[-1], dtype=np.int64)
    if len(starts):
        steps_V[0] = starts[0]
        steps_V[ends[:-1]] += starts[1:] - (starts[:-1] + counts[:-1])
    return _Ranges(offsets=offsets, index=np.cumsum(steps_V, out=steps_V))
