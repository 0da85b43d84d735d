"""Raw values become dense ids: 1 is the most frequent, 0 is padding and whatever is unknown."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Vocabulary"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of one kind of value.

    Attributes:
        values: The known raw values, sorted: numbers or strings.
        ids: The id of each, int32.
    """

    values: np.ndarray
    ids: np.ndarray

    @classmethod
    def count(cls, raw: np.ndarray, *, min_count: int = 1) -> "Vocabulary":
        """Build from occurrences; ties are broken by value, so the ids are reproducible.

        Args:
            raw: Every occurrence.
            min_count: Rarer values stay unknown.
        """
        values, counts = np.unique(raw, return_counts=True)
        return cls.of(values[counts >= min_count], counts[counts >= min_count])

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> "Vocabulary":
        """Build from values, each once, and how often each occurs."""
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        ids = np.empty(len(values), dtype=np.int32)
        ids[np.argsort(-counts, kind="stable")] = np.arange(1, len(values) + 1)
        return cls(values=values, ids=ids)

    @classmethod
    def weighted(cls, values: np.ndarray, counts: np.ndarray) -> "Vocabulary":
        """Build from values, each any number of times, and the occurrences that each stands for."""
        each, place = np.unique(values, return_inverse=True)
        # Sums of whole numbers, which a double holds exactly up to 2 ** 53.
        return cls.of(each, np.bincount(place, counts, len(each)).astype(np.int64))

    @property
    def size(self) -> int:
        """Rows of its embedding table, id 0 included."""
        return len(self.values) + 1

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Return the id of each value, int32; 0 where it is unknown."""
        if not len(self.values):
            return np.zeros(len(raw), dtype=np.int32)
        at = np.minimum(np.searchsorted(self.values, raw), len(self.values) - 1)
        return np.where(self.values[at] == raw, self.ids[at], 0).astype(np.int32)
