"""The options that every command has, with what they are when nobody says, and what they may be."""

from dataclasses import dataclass
from typing import Required, TypedDict

__all__ = ["Common", "Options", "check_least"]


class Common(TypedDict, total=False):
    """Keyword arguments of every command, which are flags of the command line.

    Attributes:
        out: Folder to make.
        seed: Of what is drawn (negatives, or which rows are held out), and of the order in which
            training rows are written; 0 by default.
        workers: Threads; 2 by default.
        max_bad_rows: Malformed raw records that are skipped before it is fatal; 100 by default.
        scratch: Local folder for rows that wait, which take about as much room as the raw files; by
            default beside the result.
        overwrite: Replace prepared data that is in the way.
    """

    out: Required[str]
    seed: int
    workers: int
    max_bad_rows: int
    scratch: str | None
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What :class:`Common` says, complete and in range.

    Attributes:
        out: Folder to make.
        seed: Of what is drawn, and of the order of training rows.
        workers: Threads.
        max_bad_rows: More bad rows are fatal.
        scratch: A local folder for rows that wait; null takes one beside the result, or the
            system's if the result is remote.
        overwrite: Whether prepared data may be replaced.

    Raises:
        ValueError: If a number is too small.
    """

    out: str
    seed: int = 0
    workers: int = 2
    max_bad_rows: int = 100
    scratch: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least(0, seed=self.seed, max_bad_rows=self.max_bad_rows)
        check_least(1, workers=self.workers)


def check_least(least: int, **options: int) -> None:
    """Refuse options that are too small.

    Raises:
        ValueError: Naming the option, its value and the least.
    """
    for name, value in options.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
