"""Working ahead in a thread changes nothing but the time, and the thread goes away."""

import threading

import pytest

from torchrec_hilomoe.data.prefetch import prefetch


def numbers(count):
    yield from range(count)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


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
