"""Runs of neighbouring entries, taken from an array all at once.

Shape legend:
    N  runs
    V  entries of all runs together
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

__all__ = ["Runs", "runs"]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Where each run lies in the result, and what it is taken from.

    Attributes:
        offsets: ``(N + 1,)`` int64: where each run begins in the result.
        index: ``(V,)`` int64: the entry that each place of the result is taken from.
    """

    offsets: np.ndarray
    index: np.ndarray

    def lists(self, values: np.ndarray) -> pa.Array:
        """Take the runs from ``values``: a list column with ``N`` rows."""
        offsets = pa.array(self.offsets, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values[self.index]))


def runs(starts_N: np.ndarray, counts_N: np.ndarray) -> Runs:
    """Return the runs ``[start, start + count)``, one after the other.

    Example:
        >>> runs(np.array([4, 0]), np.array([2, 3])).index.tolist()
        [4, 5, 0, 1, 2]
    """
    offsets = np.concatenate([[0], np.cumsum(counts_N)])
    some_N = counts_N > 0
    starts, ends = starts_N[some_N], offsets[1:][some_N]
    # Every entry is one further than the last, except where a run begins: there it jumps. One
    # array of V and one pass over it: with more, the page faults cost more than the work.
    steps_V = np.ones(offsets[-1], dtype=np.int64)
    if len(starts):
        steps_V[0] = starts[0]
        steps_V[ends[:-1]] += starts[1:] - (starts[:-1] + counts_N[some_N][:-1])
    return Runs(offsets=offsets, index=np.cumsum(steps_V, out=steps_V))
