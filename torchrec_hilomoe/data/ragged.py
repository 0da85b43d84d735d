"""Runs of neighbouring entries, taken from an array all at once.

Shape legend:
    N  runs
    V  entries of all runs together
"""

from dataclasses import dataclass

import numpy as np

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


def runs(starts_N: np.ndarray, counts_N: np.ndarray) -> Runs:
    """Return the runs ``[start, start + count)``, one after the other.

    Example:
        >>> runs(np.array([4, 0]), np.array([2, 3])).index.tolist()
        [4, 5, 0, 1, 2]
    """
    offsets = np.concatenate([[0], np.cumsum(counts_N)])
    # Entry v of run n is starts[n] + (v - offsets[n]).
    index_V = np.repeat(starts_N - offsets[:-1], counts_N)
    index_V += np.arange(len(index_V))
    return Runs(offsets=offsets, index=index_V)
