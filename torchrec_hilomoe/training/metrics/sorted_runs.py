"""Rows sorted by group and score: runs in memory, and on disk where there are too many.

Shape legend:
    N  rows
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Key", "PredictionColumns", "SortedRuns"]


@dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """What rows are sorted by."""

    group: int
    score: float


@dataclass(frozen=True, kw_only=True)
class PredictionColumns:
    """Rows.

    Attributes:
        groups: ``(N,)`` int64.
        scores: ``(N,)`` float32.
        signed: ``(N,)`` float64 weights, negative where a row was not clicked.
    """

    groups: NDArray[np.int64]
    scores: NDArray[np.float32]
    signed: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.groups)

    @classmethod
    def concatenated(cls, parts: "list[PredictionColumns]") -> "PredictionColumns":
        """Put rows one after the other."""
        return cls(
            groups=np.concatenate([np.zeros(0, np.int64), *(part.groups for part in parts)]),
            scores=np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)]),
            signed=np.concatenate([np.zeros(0, np.float64), *(part.signed for part in parts)]),
        )

    def sorted(self) -> "PredictionColumns":
        """By group and then by score."""
        order_N = _order(self.groups, self.scores)
        return PredictionColumns(
            groups=self.groups[order_N], scores=self.scores[order_N], signed=self.signed[order_N]
        )

    def compacted(self) -> "PredictionColumns":
        """Of sorted rows, make one of all clicked rows of a tie, and one of all others.

        So a model that says the same of everybody needs no more room than another.
        """
        if len(self) == 0:
            return self
        tie_N = np.ones(len(self), dtype=np.bool_)
        tie_N[1:] = (self.groups[1:] != self.groups[:-1]) | (self.scores[1:] != self.scores[:-1])
        first_T = np.flatnonzero(tie_N)
        if len(first_T) > len(self) // 4:
            return self
        sides = [np.add.reduceat(np.maximum(sign * self.signed, 0.0), first_T) for sign in (-1, 1)]
        both = np.stack([-sides[0], sides[1]], axis=1).reshape(-1)
        some = both != 0
        return PredictionColumns(
            groups=np.repeat(self.groups[first_T], 2)[some],
            scores=np.repeat(self.scores[first_T], 2)[some],
            signed=both[some],
        )

    def between(self, start: int, stop: int) -> "PredictionColumns":
        """A stretch of rows."""
        return PredictionColumns(
            groups=self.groups[start:stop],
            scores=self.scores[start:stop],
            signed=self.signed[start:stop],
        )

    def index(self, key: Key) -> int:
        """How many of these sorted rows are below ``key``."""
        start, stop = (
            int(np.searchsorted(self.groups, key.group, side)) for side in ("left", "right")
        )
        return start + int(np.searchsorted(self.scores[start:stop], key.score, "left"))

    def every(self, step: int) -> list[Key]:
        """The key of every so many rows."""
        picked = zip(self.groups[::step].tolist(), self.scores[::step].tolist(), strict=True)
        return [Key(group=group, score=score) for group, score in picked]


class SortedRuns:
    """Sorted runs of about ``capacity`` rows: the last ones in memory, those before on disk.

    Args:
        capacity: Rows that are held in memory.

    Attributes:
        rows: Number of rows in all runs.
    """

    def __init__(self, capacity: int) -> None:
        self.rows = 0
        self._capacity = capacity
        self._loose: list[PredictionColumns] = []
        self._loose_rows = 0
        self._folder: str | None = None
        self._remove: Callable[[], object] = lambda: None
        self._files: list[Path] = []

    def add(self, columns: PredictionColumns) -> None:
        """Take rows in any order."""
        self.rows += len(columns)
        self._loose.append(columns)
        self._loose_rows += len(columns)
        if self._loose_rows > self._capacity:
            self._spill()

    def runs(self) -> list[PredictionColumns]:
        """Every run; those on disk are mapped, not read."""
        self._loose = [PredictionColumns.concatenated(self._loose).sorted().compacted()]
        return [*map(_mapped, self._files), *self._loose]

    def clear(self) -> None:
        """Forget everything."""
        self.rows = self._loose_rows = 0
        self._loose.clear()
        self._files.clear()
        self._remove()
        self._folder = None

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="hilomoe-metrics-")
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder)
        path = Path(self._folder, f"run{len(self._files)}")
        run = PredictionColumns.concatenated(self._loose).sorted().compacted()
        for name in ("groups", "scores", "signed"):
            np.save(f"{path}.{name}.npy", getattr(run, name))
        self._files.append(path)
        self._loose.clear()
        self._loose_rows = 0


def _order(groups_N: NDArray[np.int64], scores_N: NDArray[np.float32]) -> NDArray[np.int64]:
    """Sort by one word of both where it holds both, which is many times as fast."""
    if len(groups_N) == 0:
        return np.zeros(0, dtype=np.int64)
    first, last = int(groups_N.min()), int(groups_N.max())
    if last - first >= 2**31:
        return np.lexsort((scores_N, groups_N))
    bits_N = np.ascontiguousarray(scores_N).view(np.int32)
    # Floats are sorted as their bits are, but for the negative ones, which go the other way.
    upwards_N = bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)
    return np.argsort(((groups_N - first) << 32) + upwards_N)


def _mapped(path: Path) -> PredictionColumns:
    columns = {
        name: np.load(f"{path}.{name}.npy", mmap_mode="r")
        for name in ("groups", "scores", "signed")
    }
    return PredictionColumns(**columns)
