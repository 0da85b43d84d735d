"""Work on the pieces of raw files, or on anything else, in threads: results come in order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

from tqdm import tqdm

from torchrec_hilomoe.data.prefetch import map_ahead
from torchrec_hilomoe.data.prepare.raw import Piece, RawFile

__all__ = ["each_piece", "in_order"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    *,
    workers: int,
    title: str,
    unit: str,
    total: int | None = None,
) -> Iterator[Result]:
    """Work on items in threads, and yield the results in the items' order.

    One item more than there are threads is in memory at a time.

    Args:
        items: Advanced by the caller's thread.
        work: Called in any thread.
        workers: Threads.
        title: Of the progress bar.
        unit: What the bar counts.
        total: How many items there are, if that is known.

    Yields:
        What the work returned.
    """
    # Off a terminal there is no bar; a line a step is all.
    with (
        tqdm(desc=title, unit=f" {unit}", total=total, disable=None) as bar,
        closing(map_ahead(work, items, workers=workers, ahead=workers)) as results,
    ):
        for result in results:
            yield result
            bar.update()


def each_piece(
    files: Sequence[RawFile],
    columns: Sequence[str],
    work: Callable[[int, Piece], Result],
    *,
    workers: int,
    title: str,
) -> Iterator[tuple[Piece, Result]]:
    """Work on all pieces of all files in threads, and yield the results in order.

    Args:
        files: Read one after the other.
        columns: Those that are needed.
        work: Called with the file's number and a piece.
        workers: Threads.
        title: Of the progress bar.

    Yields:
        Each piece and what the work returned.
    """

    def numbered() -> Iterator[tuple[int, Piece]]:
        for number, file in enumerate(files):
            for piece in file.pieces(columns):
                yield number, piece
            logger.info("%s: %s read", title, file.path)

    def both(item: tuple[int, Piece]) -> tuple[Piece, Result]:
        return item[1], work(*item)

    yield from in_order(numbered(), both, workers=workers, title=title, unit="pieces")
