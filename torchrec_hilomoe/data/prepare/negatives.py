"""Items that a user never had, drawn at random: for an event, the same ones whoever draws them.

Each draw is a hash of the seed, the user, the event's place and the attempt, so it does not depend
on which other users are looked at, or on threads.

Shape legend:
    N  events of some users, those of a user together and in order
"""

import numpy as np

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.timelines import Timelines

__all__ = ["draw_negatives"]


def draw_negatives(user_N: np.ndarray, code_N: np.ndarray, items: int, seed: int) -> np.ndarray:
    """Draw, for each event, an item that its user never had, each with the same chance.

    Args:
        user_N: Whose event; all events of these users are there.
        code_N: The item of each event, from 0 to ``items - 1``.
        items: How many there are.
        seed: Of the draws.

    Raises:
        DataError: If a user has every item.
    """
    times = Timelines(user_N)
    had = np.unique(times.user * items + code_N)
    full = np.bincount(had // items, minlength=times.users) == items
    if full.any():
        user = user_N[times.user == np.argmax(full)][0]
        raise DataError(
            f"user {user} has bought all {items} items, so there is no negative for them; take a "
            "larger data set."
        )
    salt_N = mix64(mix64(np.full(len(user_N), seed)) ^ user_N.astype(np.uint64))
    keys_N = mix64(salt_N + times.position.astype(np.uint64))
    drawn_N = np.empty(len(user_N), dtype=np.int64)
    open_N, attempt = np.arange(len(user_N)), 0
    while len(open_N):
        drawn = mix64(keys_N[open_N] + np.uint64(attempt)) % np.uint64(items)
        drawn_N[open_N] = drawn.astype(np.int64)
        open_N = open_N[np.isin(times.user[open_N] * items + drawn_N[open_N], had)]
        attempt += 1
    return drawn_N
