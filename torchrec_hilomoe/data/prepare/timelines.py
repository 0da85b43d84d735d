"""Events in each user's order of time, and what lies before each.

Shape legend:
    N  events
    M  events that are asked about
"""

import numpy as np

from torchrec_hilomoe.data.prepare.runs import Runs, runs

__all__ = ["Timelines"]


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
