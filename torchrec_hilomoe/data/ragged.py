"""Columns of many ids a row: cut to a length, and put into another order of rows.

Shape legend:
    N  rows
    V  ids of a column, all rows together
"""

from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch

__all__ = ["Cut", "Ragged"]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A column of ids: row ``n`` is ``values[offsets[n]:offsets[n + 1]]``.

    Attributes:
        values: ``(V,)``, of any integer type; the memory may be Arrow's, so nobody writes to it.
        offsets: ``(N + 1,)``, of any integer type, from 0.
    """

    values: np.ndarray
    offsets: np.ndarray


class Cut:
    """Which ids rows keep, and in which order the rows stand, for columns of equal lengths.

    Where rows lose ids, a row is seen as two segments, of which one is kept. FBGEMM copies whole
    segments into their order, several times faster than numpy copies ids.

    Args:
        offsets: As stored; see :class:`Ragged`.
        order_N: The stored row at each place of the result; ``None`` keeps the order.
        bad_N: Stored rows that keep nothing; ``None`` if there are none.
        max_length: What longer rows are cut to.
        keep: Which end of a longer row stays, ``"last"`` or ``"first"``.

    Attributes:
        stored: ``offsets`` as given.
        lengths: ``(N,)`` int32, of the result.
        offsets: ``(N + 1,)``, of the result.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        *,
        order_N: np.ndarray | None,
        bad_N: np.ndarray | None,
        max_length: int,
        keep: str,
    ) -> None:
        self.stored = offsets
        stored_N = (offsets[1:] - offsets[:-1]).astype(np.int32, copy=False)
        whole = bad_N is None and stored_N.max(initial=0) <= max_length
        if whole and order_N is None:
            self._segments = None
            self.lengths, self.offsets = stored_N, offsets
            return
        order_N = np.arange(len(stored_N)) if order_N is None else order_N
        if whole:
            kept_N, picked_N, segments = stored_N, order_N, stored_N
        else:
            kept_N = np.minimum(stored_N, max_length)
            if bad_N is not None:
                kept_N[bad_N] = 0
            last = int(keep == "last")
            pairs_N2 = np.empty((len(kept_N), 2), dtype=np.int32)
            pairs_N2[:, last] = kept_N
            pairs_N2[:, 1 - last] = stored_N - kept_N
            picked_N, segments = 2 * order_N + last, pairs_N2.reshape(-1)
        self._picked_N = torch.from_numpy(picked_N.astype(np.int32))
        self._segments = torch.from_numpy(segments)
        self.lengths = kept_N[order_N]
        self.offsets = np.zeros(len(kept_N) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self.offsets[1:])

    def take(self, values: np.ndarray) -> np.ndarray:
        """Return the kept ids of one column."""
        if self._segments is None:
            return values
        if values.dtype not in (np.int32, np.int64):
            values = values.astype(np.int64)
        _, taken, _ = torch.ops.fbgemm.permute_1D_sparse_data(
            self._picked_N, self._segments, torch.from_numpy(values), None, int(self.offsets[-1])
        )
        return taken.numpy()
