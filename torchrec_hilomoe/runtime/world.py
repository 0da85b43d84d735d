"""``World``: which of the processes of a job this one is."""

from dataclasses import dataclass

__all__ = ["World"]


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: From 0.
        size: Number of processes.

    Raises:
        ValueError: If ``rank`` is outside ``[0, size)``.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"World.rank must be at least 0 and below World.size, got rank {self.rank} and "
                f"size {self.size}."
            )
