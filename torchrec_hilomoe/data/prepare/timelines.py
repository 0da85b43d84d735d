"""Events in each user's order of time, and what lies before each.

Shape legend:
    N  events
    M  events that are asked about
"""

import numpy as np

from torchrec_hilomoe.data.prepare.runs import Runs, runs

__all__ = ["Timelines"]


class Timelines:
    """Events sorted by user, then time; simultaneous events keep the order of the file.

    Args:
        user_N: Whose event, in any order.
        time_N: When, in any unit.

    Attributes:
        order: ``(N,)``: the sorted events as indices into the unsorted ones. Everything else
            here speaks of sorted events.
        begin: ``(N,)``: the user's first event.
        position: ``(N,)``: how many events of the user are earlier.
        count: ``(N,)``: how many events the user has.
    """

    def __init__(self, user_N: np.ndarray, time_N: np.ndarray) -> None:
        self.order = np.lexsort((time_N, user_N))
        sorted_user_N = user_N[self.order]
        first_N = np.ones(len(user_N), dtype=bool)
        first_N[1:] = sorted_user_N[1:] != sorted_user_N[:-1]
        begins = np.flatnonzero(first_N)
        counts = np.diff(np.append(begins, len(user_N)))
        self.begin = np.repeat(begins, counts)
        self.count = np.repeat(counts, counts)
        self.position = np.arange(len(user_N)) - self.begin

    def earlier(self, events_M: np.ndarray, limit: int) -> Runs:
        """Return the last ``limit`` events of the same user before each event."""
        counts_M = np.minimum(self.position[events_M], limit)
        return runs(events_M - counts_M, counts_M)

    def chosen_before(self, chosen_N: np.ndarray) -> np.ndarray:
        """Return how many chosen events, of all users, stand before each event: ``(N,)``."""
        return np.cumsum(chosen_N) - chosen_N

    def earlier_chosen(self, before_N: np.ndarray, events_M: np.ndarray, limit: int) -> Runs:
        """Return the last ``limit`` chosen events of the same user before each event.

        Args:
            before_N: What :meth:`chosen_before` returned.
            events_M: Before which.
            limit: How many at most.

        Returns:
            Runs that index the chosen events, as ``flatnonzero`` lists them.
        """
        ends_M = before_N[events_M]
        counts_M = np.minimum(ends_M - before_N[self.begin[events_M]], limit)
        return runs(ends_M - counts_M, counts_M)

    def split(self, train: int, valid: int) -> np.ndarray:
        """Cut each user's events by time, in percent: ``(N,)`` 0 train, 1 valid, 2 test."""
        after_train_N = self.position >= self.count * train // 100
        return after_train_N + (self.position >= self.count * (train + valid) // 100).astype(int)
