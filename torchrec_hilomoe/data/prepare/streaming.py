"""Lists of work, done in threads: results come in order, progress is shown."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

from tqdm import tqdm

from torchrec_hilomoe.data.prefetch import map_ahead

__all__ = ["in_order"]

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

    One item more than there are threads is in memory at a time. Polars' own streaming engine ran
    some thirty batches ahead of whoever took the results: 1.6 GB for 160 MB of text.

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
