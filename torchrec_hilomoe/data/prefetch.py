"""Iterators that work ahead in threads of their own.

Threads, not processes: reading, decoding and copying happen in Arrow, FBGEMM and numpy, which
release Python's lock, and a thread hands over a batch for nothing.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import TypeVar

__all__ = ["map_ahead", "prefetch"]

S = TypeVar("S")
T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield ``items``, up to ``depth`` of them made ahead in a background thread.

    An error of ``items`` is raised here, after the items before it. When the consumer stops
    early, the thread finishes the item it is at and ends, and ``items`` is closed, before the
    generator's ``close`` returns.

    Args:
        items: Advanced in the background, one call at a time.
        depth: How many may wait; 0 makes each when it is asked for, without a thread.

    Yields:
        The same items, in the same order.
    """
    try:
        if depth == 0:
            yield from items
            return
        room, ready, stopped = Semaphore(depth), SimpleQueue(), Event()

        def produce() -> None:
            for item in items:
                ready.put(item)
                room.acquire()
                if stopped.is_set():
                    return

        with _pool(1, "prefetch") as pool:
            finished = object()
            producing = pool.submit(produce)
            producing.add_done_callback(lambda _: ready.put(finished))
            try:
                while (item := ready.get()) is not finished:
                    room.release()
                    yield item
                producing.result()
            finally:
                stopped.set()
                room.release()
    finally:
        items.close()


def map_ahead(
    function: Callable[[S], T], items: Iterable[S], *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """Yield ``function`` of each item, in order, made ahead by a number of threads.

    An error is raised here, after the results before it. When the consumer stops early, the
    threads finish what they are at and end before the generator's ``close`` returns.

    Args:
        function: Called from several threads at once.
        items: Advanced by the consumer's thread.
        workers: Threads; 0 makes each result when it is asked for, without one.
        ahead: Results that may wait beside the one that is asked for; at least ``workers``.

    Yields:
        The results, in the order of the items.
    """
    if workers == 0:
        yield from map(function, items)
        return
    assert ahead >= workers, f"{workers} workers, but room for {ahead} results"
    with _pool(workers, "decode") as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _pool(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that are asked for nothing more once the block is left."""
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
