"""MovieLens-1M: a click is a rating of four stars or more.

The history is what the user rated before, movie by movie, with genres and stars. Each user's
ratings are cut in the order of time: the first 80 % train, the next 10 % validate, the last
10 % test. Everything in a row but its label is known before the rating is given.
"""

from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.log import prepare_log
from torchrec_hilomoe.data.prepare.movielens_log import Lengths, Ratings

__all__ = ["prepare_movielens"]


def prepare_movielens(
    *,
    raw: str,
    out: str,
    max_history: int = 50,
    max_liked: int = 100,
    seed: int = 0,
    workers: int = 2,
    max_bad_rows: int = 100,
    scratch: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Prepare MovieLens-1M: predict whether a user gives a movie four stars or more.

    Args:
        raw: Folder with ratings.dat, movies.dat and users.dat, each plain or gzipped (.gz).
        out: Folder to make.
        max_history: How many of the user's last ratings a row keeps; a run can cut further.
        max_liked: How many of the user's last liked movies a row keeps, as a bag.
        seed: Of the order in which training rows are written.
        workers: Threads.
        max_bad_rows: Malformed raw lines that are skipped before it is fatal.
        scratch: Local folder for rows that wait; by default beside the result.
        overwrite: Replace prepared data that is in the way.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range.
    """
    return prepare_log(
        lambda _: Ratings(raw, Lengths(history=max_history, liked=max_liked)),
        out=out,
        lengths={"max_history": max_history, "max_liked": max_liked},
        seed=seed,
        workers=workers,
        max_bad_rows=max_bad_rows,
        scratch=scratch,
        overwrite=overwrite,
    )
