"""Rows of similar length together: less padding, at the price of an order that is less random.

A shard's rows are sorted within windows that every shard shares, so the batches of all ranks become
long and short together, and a window's rows are the same with and without sorting.

Shape legend:
    N  rows of a window
    G  kinds of lengths: one a row, then those of each of ``ColumnLayout.lists``
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from torchrec_hilomoe.data.decode import DecodedBlock, Rows
from torchrec_hilomoe.data.layout import ColumnLayout
from torchrec_hilomoe.data.ragged import cut_alike, CutColumns, Ragged

__all__ = ["SortedShard", "sort_rows"]


def sort_rows(layout: ColumnLayout, parts: Sequence[Rows], *, descending: bool) -> DecodedBlock:
    """Join rows and sort them by their longest history; rows of equal length keep their order.

    Args:
        layout: What the rows were decoded with.
        parts: At least one row in all.
        descending: Whether the longest come first.

    Returns:
        All rows; ``bad`` is empty, since bad rows are reported before.
    """
    lengths_GN = np.concatenate([part.lengths for part in parts], axis=1)
    longest_N = lengths_GN[1 : 1 + len(layout.schema.sequences)].max(axis=0, initial=0)
    order_N = np.argsort(-longest_N if descending else longest_N, kind="stable")
    columns = [np.concatenate(pieces) for pieces in zip(*(p.lists for p in parts), strict=True)]
    sorted_lists: list[CutColumns] = []
    for lengths_N, lists in zip(lengths_GN[1:], layout.lists, strict=True):
        stored = np.zeros(len(order_N) + 1, dtype=np.int64)
        np.cumsum(lengths_N, out=stored[1:])
        mine = [columns.pop(0) for _ in lists.columns]
        sorted_lists.append(
            cut_alike(
                [Ragged(values=values, offsets=stored) for values in mine],
                order_N=order_N,
                bad_N=None,
                max_length=lists.max_length,
                keep=lists.keep,
            )
        )
    rows = Rows(
        singles=np.concatenate([part.singles for part in parts], axis=1).take(order_N, axis=1),
        lists=[values for lists in sorted_lists for values in lists.values],
        lengths=lengths_GN.take(order_N, axis=1),
        dense=np.concatenate([part.dense for part in parts]).take(order_N, axis=0),
        floats=np.concatenate([part.floats for part in parts], axis=1).take(order_N, axis=1),
        integers=np.concatenate([part.integers for part in parts], axis=1).take(order_N, axis=1),
    )
    offsets = [lists.offsets for lists in sorted_lists for _ in lists.values]
    return DecodedBlock(rows=rows, offsets=offsets, bad={})


class SortedShard:
    """The rows of one shard, sorted within windows, a batch's share at a time.

    Args:
        layout: What the rows were decoded with.
        take_window: Returns the next window's rows, as they stand; none at the end.
        descending: Says of each window, counted from the first one taken, which end comes first.
        rows: How many are taken at a time.
        skip: Rows of the first window, as sorted, that are consumed already.
    """

    def __init__(
        self,
        layout: ColumnLayout,
        take_window: Callable[[], list[Rows]],
        descending: Callable[[int], bool],
        *,
        rows: int,
        skip: int,
    ) -> None:
        self._layout = layout
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
            window = sort_rows(self._layout, parts, descending=self._descending(self._windows))
            stop = window.rows.lengths.shape[1]
            borders = [*range(min(self._skip, stop), stop, self._rows), stop]
            self._pieces.extend(window.pieces(borders))
            self._windows, self._skip = self._windows + 1, 0
        return [self._pieces.popleft()] if self._pieces else []
