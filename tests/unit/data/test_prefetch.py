"""Working ahead in a thread changes nothing but the time, and the thread goes away."""

import threading
import time

import pytest

from torchrec_hilomoe.data.prefetch import map_ahead, prefetch


def numbers(count):
    yield from range(count)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith(("prefetch", "decode"))]


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_yields_the_same_items_in_order(depth):
    assert list(prefetch(numbers(20), depth)) == list(range(20))
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_raises_the_producers_error_after_the_items_before_it(depth):
    def items():
        yield from range(5)
        raise RuntimeError("the disk is gone")

    ahead = prefetch(items(), depth)
    seen = [next(ahead) for _ in range(5)]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(ahead)
    assert seen == list(range(5))
    assert not prefetch_threads()


def test_is_bounded():
    made = []

    def items():
        for item in range(100):
            made.append(item)
            yield item

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    ahead.close()
    assert len(made) <= 1 + 3 + 1  # yielded, waiting, and the one that replaced the yielded one


def test_closing_early_ends_the_thread():
    items = numbers(1000)
    ahead = prefetch(items, 2)
    next(ahead)
    assert len(prefetch_threads()) == 1
    ahead.close()
    assert not prefetch_threads()
    assert list(items) == []  # closed too, so what it holds is let go


def test_breaking_out_of_a_loop_ends_the_thread():
    for item in prefetch(numbers(1000), 2):
        if item == 3:
            break
    assert not prefetch_threads()


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (1, 1), (2, 5), (4, 4), (3, 100)])
def test_maps_in_order_whichever_is_ready_first(workers, ahead):
    def slow_if_even(item):
        time.sleep(0.002 * (item % 2 == 0))
        return item * item

    mapped = map_ahead(slow_if_even, range(20), workers=workers, ahead=ahead)
    assert list(mapped) == [item * item for item in range(20)]
    assert not prefetch_threads()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_of_a_worker_comes_after_the_results_before_it(workers):
    def fail_at_five(item):
        if item >= 5:
            raise RuntimeError(f"item {item} is gone")
        return item

    seen = []
    with pytest.raises(RuntimeError, match="item 5 is gone"):
        seen.extend(map_ahead(fail_at_five, range(100), workers=workers, ahead=workers + 2))
    assert seen == list(range(5))
    assert not prefetch_threads()


def test_workers_stay_within_their_bounds():
    asked = []

    def items():
        for item in range(100):
            asked.append(item)
            yield item

    ahead = map_ahead(str, items(), workers=2, ahead=4)
    assert next(ahead) == "0"
    assert len(asked) == 5
    ahead.close()
    assert not prefetch_threads()
