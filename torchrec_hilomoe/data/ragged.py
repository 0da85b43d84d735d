"""Columns of many ids a row: cut to a length, and put into another order of rows.

Shape legend:
    N  rows
    V  ids of a column, all rows together
"""

from collections.abc import Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401 - registers torch.ops.fbgemm
import numpy as np
import torch
from torch import Tensor

__all__ = ["CutColumns", "Ragged", "cut_alike"]

# Of the same width: bits are moved, not numbers.
FLOATS = {torch.int32: torch.float32, torch.int64: torch.float64}


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A column of ids: row ``n`` is ``values[offsets[n]:offsets[n + 1]]``.

    Attributes:
        values: ``(V,)``, of any integer type; the memory may be Arrow's, so nobody writes to it.
        offsets: ``(N + 1,)``, of any integer type, from 0.
    """

    values: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, kw_only=True)
class CutColumns:
    """Columns of equal lengths, cut and reordered.

    Attributes:
        values: ``(V,)`` of each.
        lengths: ``(N,)`` int32.
        offsets: ``(N + 1,)``.
    """

    values: list[np.ndarray]
    lengths: np.ndarray
    offsets: np.ndarray


def cut_alike(
    columns: Sequence[Ragged],
    *,
    order_N: np.ndarray | None,
    bad_N: np.ndarray | None,
    max_length: int,
    keep: str,
) -> CutColumns:
    """Choose the ids that rows keep, and put the rows into an order.

    Args:
        columns: At least one; their lengths differ in bad rows only.
        order_N: The stored row at each place of the result; ``None`` keeps the order.
        bad_N: Stored rows that keep nothing; ``None`` if there are none.
        max_length: What longer rows are cut to.
        keep: Which end of a longer row stays, ``"last"`` or ``"first"``.

    Returns:
        The columns, which may be the memory of those given.
    """

    def cut_of(column: Ragged) -> _Cut:
        return _Cut(column.offsets, order_N=order_N, bad_N=bad_N, max_length=max_length, keep=keep)

    first, *others = columns
    cut = cut_of(first)
    if all(np.array_equal(first.offsets, other.offsets) for other in others):
        values = cut.take([column.values for column in columns])
    else:
        values = [taken for column in columns for taken in cut_of(column).take([column.values])]
    return CutColumns(values=values, lengths=cut.lengths, offsets=cut.offsets)


class _Cut:
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

    def take(self, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the kept ids of columns that have these offsets."""
        if self._segments is None:
            return list(columns)
        tensors = [torch.from_numpy(_copyable(values)) for values in columns]
        taken: list[Tensor] = []
        while tensors:
            values = tensors.pop(0)
            # Beside the ids FBGEMM moves weights in the same pass: a second column, as it were.
            pair = tensors and tensors[0].dtype == values.dtype
            weights = tensors.pop(0).view(FLOATS[values.dtype]) if pair else None
            _, kept, others = torch.ops.fbgemm.permute_1D_sparse_data(
                self._picked_N, self._segments, values, weights, int(self.offsets[-1])
            )
            taken += [kept] if others is None else [kept, others.view(values.dtype)]
        return [values.numpy() for values in taken]


def _copyable(values: np.ndarray) -> np.ndarray:
    return values if values.dtype in (np.int32, np.int64) else values.astype(np.int64)
