"""Which of many numbers has a given rank, in memory that does not grow with them."""

import os
from threading import Lock

import numpy as np

__all__ = ["Buckets", "OrderStatistics"]

PENDING = 1 << 20


class OrderStatistics:
    """Collects whole numbers; threads may add at the same time.

    Polars' sort keeps all: 640 MB of numbers took 2.6 GB.

    Args:
        scratch: A local folder.
        name: Of files there.
    """

    def __init__(self, scratch: str, name: str) -> None:
        self._path = os.path.join(scratch, name)
        self._lock = Lock()
        self._pending: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []
        self.count = 0

    def add(self, numbers: np.ndarray) -> None:
        """Take some numbers, in any order."""
        with self._lock:
            self._pending.append(numbers.astype(np.int64))
            self.count += len(numbers)
            if sum(map(len, self._pending)) > PENDING:
                self._write_run()

    def at(self, rank: int) -> int:
        """Return the number that has ``rank`` others before it, in rising order.

        It is found between the least and the largest by halving, and asking each run how many of
        its numbers lie on either side.

        Raises:
            IndexError: If there is none.
        """
        if not 0 <= rank < self.count:
            raise IndexError(f"rank {rank} of {self.count} numbers")
        self._write_run()
        low = min(int(run[0]) for run in self._runs)
        high = max(int(run[-1]) for run in self._runs)
        while low < high:
            middle = (low + high) // 2
            below = sum(int(np.searchsorted(run, middle, "right")) for run in self._runs)
            low, high = (low, middle) if below > rank else (middle + 1, high)
        return low

    def below(self, number: int) -> int:
        """Return how many numbers are smaller."""
        self._write_run()
        return sum(int(np.searchsorted(run, number, "left")) for run in self._runs)

    def up_to(self, number: int) -> int:
        """Return how many numbers are not larger."""
        return self.below(number + 1)

    def _write_run(self) -> None:
        numbers = np.concatenate([np.empty(0, np.int64), *self._pending])
        self._pending = []
        if len(numbers):
            path = f"{self._path}-{len(self._runs):05d}.npy"
            np.save(path, np.sort(numbers))
            # Mapped: a search reads the few pages that it looks at.
            self._runs.append(np.load(path, mmap_mode="r"))


class Buckets:
    """Finds buckets with about as many numbers each; threads may add at the same time.

    Args:
        scratch: A local folder.
        name: Of files there.
    """

    def __init__(self, scratch: str, name: str) -> None:
        self._ranks = OrderStatistics(scratch, name)

    def add(self, numbers: np.ndarray) -> None:
        """Take some numbers, float64, in any order; NaN does not count."""
        self._ranks.add(_ordered(numbers[~np.isnan(numbers)] + 0.0))  # -0.0 is 0.0

    def least(self, buckets: int) -> np.ndarray:
        """Return the least number of each bucket, rising; the first is minus infinity.

        Ties make them fewer: no bucket is empty but the only one of no number at all.
        """
        count = self._ranks.count
        if not count:
            return np.array([-np.inf])
        ranks = [0, *(number * count // buckets for number in range(1, buckets))]
        found = np.array([self._ranks.at(rank) for rank in ranks])
        least = np.unique(_ordered(found.view(np.float64)).view(np.float64))
        return np.concatenate([[-np.inf], least[1:]])


def _ordered(numbers: np.ndarray) -> np.ndarray:
    """Turn floats into whole numbers of the same order, by their bits; twice, it turns back."""
    bits = numbers.view(np.int64)
    return bits ^ ((bits >> 63) & np.int64(0x7FFF_FFFF_FFFF_FFFF))
