"""An iterator that works ahead in a thread of its own."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items``, up to ``depth`` of them made ahead in a background thread.

    An error of ``items`` is raised here, after the items before it. When the consumer stops
    early, the thread finishes the item it is at and ends before the generator's ``close``
    returns.

    Args:
        items: Advanced in the background, one call at a time.
        depth: How many may wait; 0 makes each when it is asked for, without a thread.

    Yields:
        The same items, in the same order.
    """
    if depth == 0:
        yield from items
        return
    exhausted = object()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        waiting: deque[Future] = deque(worker.submit(next, items, exhausted) for _ in range(depth))
        while (item := waiting.popleft().result()) is not exhausted:
            waiting.append(worker.submit(next, items, exhausted))
            yield item
    finally:
        worker.shutdown(wait=True, cancel_futures=True)
