"""Events in each user's order of time, and what lies before each.

Shape legend:
    N  events, or ranges of neighbouring entries
    M  events that are asked about
    V  entries of all ranges together
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

__all__ = ["Ranges", "Timelines", "ranges"]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Where each range lies in the result, and what it is taken from.

    Attributes:
        offsets: ``(N + 1,)`` int64: where each range begins in the result.
        index: ``(V,)`` int64: the entry that each place of the result is taken from.
    """

    offsets: np.ndarray
    index: np.ndarray

    def lists(self, values: np.ndarray) -> pa.Array:
        """Take the ranges from ``values``: a list column with ``N`` rows."""
        offsets = pa.array(self.offsets, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values[self.index]))


def ranges(starts_N: np.ndarray, counts_N: np.ndarray) -> Ranges:
    """Return the ranges ``[start, start + count)``, one after the other.

    Example:
        >>> ranges(np.array([4, 0]), np.array([2, 3])).index.tolist()
        [4, 5, 0, 1, 2]
    """
    offsets = np.concatenate([[0], np.cumsum(counts_N)])
    some_N = counts_N > 0
    starts, ends = starts_N[some_N], offsets[1:][some_N]
    # Every entry is one further than the last, except where a range begins: there it jumps. One
    # array of V and one pass over it: with more, the page faults cost more than the work.
    steps_V = np.ones(offsets[-1], dtype=np.int64)
    if len(starts):
        steps_V[0] = starts[0]
        steps_V[ends[:-1]] += starts[1:] - (starts[:-1] + counts_N[some_N][:-1])
    return Ranges(offsets=offsets, index=np.cumsum(steps_V, out=steps_V))


class Timelines:
    """Where each event stands among its user's.

    Args:
        user_N: Whose event; those of a user together, in order of time.

    Attributes:
        begin: ``(N,)``: the user's first event.
        position: ``(N,)``: how many events of the user are earlier.
        count: ``(N,)``: how many events the user has.
        users: How many there are.
        user: ``(N,)``: how many users stand before.
    """

    def __init__(self, user_N: np.ndarray) -> None:
        first_N = np.ones(len(user_N), dtype=bool)
        first_N[1:] = user_N[1:] != user_N[:-1]
        begins = np.flatnonzero(first_N)
        counts = np.diff(np.append(begins, len(user_N)))
        self.begin = np.repeat(begins, counts)
        self.count = np.repeat(counts, counts)
        self.position = np.arange(len(user_N)) - self.begin
        self.users = len(begins)
        self.user = np.cumsum(first_N) - 1

    def earlier(self, events_M: np.ndarray, limit: int) -> Ranges:
        """Return the last ``limit`` events of the same user before each event."""
        counts_M = np.minimum(self.position[events_M], limit)
        return ranges(events_M - counts_M, counts_M)

    def chosen_before(self, chosen_N: np.ndarray) -> np.ndarray:
        """Return how many chosen events, of all users, stand before each event: ``(N,)``."""
        return np.cumsum(chosen_N) - chosen_N

    def earlier_chosen(self, before_N: np.ndarray, events_M: np.ndarray, limit: int) -> Ranges:
        """Return the last ``limit`` chosen events of the same user before each event.

        Args:
            before_N: What :meth:`chosen_before` returned.
            events_M: Before which.
            limit: How many at most.

        Returns:
            Ranges that index the chosen events, as ``flatnonzero`` lists them.
        """
        ends_M = before_N[events_M]
        counts_M = np.minimum(ends_M - before_N[self.begin[events_M]], limit)
        return ranges(ends_M - counts_M, counts_M)

    def split(self, train: int, valid: int) -> np.ndarray:
        """Cut each user's events by time, in percent: ``(N,)`` 0 train, 1 valid, 2 test."""
        after_train_N = self.position >= self.count * train // 100
        return after_train_N + (self.position >= self.count * (train + valid) // 100).astype(int)
