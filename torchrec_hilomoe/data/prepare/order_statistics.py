"""Which of many numbers has a given rank, in memory that does not grow with them."""

import os

import numpy as np

__all__ = ["OrderStatistics"]

PENDING = 1 << 20


class OrderStatistics:
    """Collects whole numbers. Polars' sort keeps all: 640 MB of numbers took 2.6 GB.

    Args:
        scratch: A local folder.
        name: Of files there.
    """

    def __init__(self, scratch: str, name: str) -> None:
        self._path = os.path.join(scratch, name)
        self._pending: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []
        self.count = 0

    def add(self, numbers: np.ndarray) -> None:
        """Take some numbers, in any order."""
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
