"""Rows of similar length together: less padding, at the price of an order that is less random.

A lane's rows are sorted within windows that every lane shares, so the batches of all ranks become
long and short together, and a window's rows are the same with and without sorting.

Shape legend:
    N  rows of a window
    K  keys of both jagged tensors, the unpooled ones first
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from torchrec_hilomoe.data.decode import DecodedBlock, lengths_of_ids, Rows
from torchrec_hilomoe.data.ragged import Cut
from torchrec_hilomoe.data.schema import Schema

__all__ = ["SortedLane", "sort_rows"]


def sort_rows(schema: Schema, parts: Sequence[Rows], *, descending: bool) -> DecodedBlock:
    """Join rows and sort them by their longest history; rows of equal length keep their order.

    Args:
        schema: What the rows were decoded with.
        parts: At least one row in all.
        descending: Whether the longest come first.

    Returns:
        All rows; ``bad`` is empty, since bad rows are reported before.
    """
    lengths_KN = np.concatenate([part.lengths for part in parts], axis=1)
    histories = slice(len(schema.candidate), len(schema.unpooled_keys))
    longest_N = lengths_KN[histories].max(axis=0, initial=0)
    order_N = np.argsort(-longest_N if descending else longest_N, kind="stable")
    ids: list[np.ndarray] = []
    offsets: list[np.ndarray | None] = []
    columns = zip(*(part.ids for part in parts), strict=True)
    for pieces, key in zip(columns, lengths_of_ids(schema), strict=True):
        stored = np.zeros(len(order_N) + 1, dtype=np.int64)
        np.cumsum(lengths_KN[key], out=stored[1:])
        cut = Cut(
            stored, order_N=order_N, bad_N=None, max_length=np.iinfo(np.int32).max, keep="last"
        )
        ids.append(cut.take(np.concatenate(pieces)))
        offsets.append(cut.offsets)
    rows = Rows(
        ids=ids,
        lengths=lengths_KN.take(order_N, axis=1),
        dense=np.concatenate([part.dense for part in parts]).take(order_N, axis=0),
        floats=np.concatenate([part.floats for part in parts], axis=1).take(order_N, axis=1),
        integers=np.concatenate([part.integers for part in parts], axis=1).take(order_N, axis=1),
    )
    return DecodedBlock(rows=rows, offsets=offsets, bad={})


class SortedLane:
    """The rows of one lane, sorted within windows, a batch's share at a time.

    Args:
        schema: What the rows were decoded with.
        take_window: Returns the next window's rows, as they stand; none at the end.
        descending: Says of each window, counted from the first one taken, which end comes first.
        rows: How many are taken at a time.
        skip: Rows of the first window, as sorted, that are consumed already.
    """

    def __init__(
        self,
        schema: Schema,
        take_window: Callable[[], list[Rows]],
        descending: Callable[[int], bool],
        *,
        rows: int,
        skip: int,
    ) -> None:
        self._schema = schema
        self._take_window = take_window
        self._descending = descending
        self._rows = rows
        self._skip = skip
        self._windows = 0
        self._pieces: deque[Rows] = deque()

    def take(self) -> list[Rows]:
        """Return the next rows of the window, or what is left of them."""
        if not self._pieces:
            parts = self._take_window()
            if not parts:
                return []
            window = sort_rows(self._schema, parts, descending=self._descending(self._windows))
            stop = window.rows.lengths.shape[1]
            borders = [*range(min(self._skip, stop), stop, self._rows), stop]
            self._pieces.extend(window.pieces(borders))
            self._windows, self._skip = self._windows + 1, 0
        return [self._pieces.popleft()] if self._pieces else []
