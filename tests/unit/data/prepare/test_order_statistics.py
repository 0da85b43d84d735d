"""Order statistics against sorting, also when memory holds only a few numbers."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from torchrec_hilomoe.data.prepare import order_statistics
from torchrec_hilomoe.data.prepare.order_statistics import Buckets, OrderStatistics


@pytest.mark.parametrize("pending", [7, 1 << 20])
@pytest.mark.parametrize("spread", [3, 2**62])
def test_matches_sorting(tmp_path, monkeypatch, pending, spread):
    monkeypatch.setattr(order_statistics, "PENDING", pending)
    numbers = np.random.default_rng(0).integers(-spread, spread, size=500)
    found = OrderStatistics(str(tmp_path), "n")
    for part in np.array_split(numbers, 30):
        found.add(part)
    assert found.count == 500
    wanted = np.sort(numbers).tolist()
    assert [found.at(rank) for rank in range(0, 500, 7)] == wanted[::7]
    for number in (*wanted[::50], 0, spread):
        assert found.below(number) == sum(other < number for other in wanted)
        assert found.up_to(number) == sum(other <= number for other in wanted)
    found.add(np.array([-spread]))
    assert found.at(0) == -spread
    assert bool(list(tmp_path.iterdir()))


@pytest.mark.parametrize("rank", [-1, 0, 3])
def test_a_rank_that_is_not_there_is_an_error(tmp_path, rank):
    found = OrderStatistics(str(tmp_path), "n")
    if rank:
        found.add(np.array([1, 2, 3]))
    with pytest.raises(IndexError, match=f"rank {rank} of "):
        found.at(rank)


@pytest.mark.parametrize("pending", [7, 1 << 20])
@pytest.mark.parametrize("digits", [0, 9], ids=["ties", "no ties"])
def test_buckets_hold_about_as_many_numbers_each(tmp_path, monkeypatch, pending, digits):
    monkeypatch.setattr(order_statistics, "PENDING", pending)
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(size=300).round(digits), [-0.0, 0.0, np.inf, -np.inf]])
    found = Buckets(str(tmp_path), "n")
    for part in np.array_split(np.concatenate([numbers, [np.nan]]), 20):
        found.add(part)
    least = found.least(8)
    ranked = np.sort(numbers)
    wanted = {ranked[number * len(ranked) // 8] for number in range(1, 8)} - {ranked[0]}
    assert least.tolist() == [-np.inf, *sorted(wanted)]
    sizes = np.bincount(np.searchsorted(least, numbers, "right"))[1:]
    assert sizes.min() > 0
    if digits:
        assert set(sizes.tolist()) <= {len(numbers) // 8, len(numbers) // 8 + 1}


def test_there_is_a_bucket_whatever_the_numbers(tmp_path):
    assert Buckets(str(tmp_path), "none").least(4).tolist() == [-np.inf]
    same = Buckets(str(tmp_path), "same")
    same.add(np.full(9, -2.5))
    assert same.least(4).tolist() == [-np.inf]


def test_threads_may_add_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(order_statistics, "PENDING", 50)
    numbers = np.random.default_rng(0).integers(-(2**40), 2**40, size=4000)
    parts = np.array_split(numbers, 400)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        found = OrderStatistics(str(tmp_path), "n")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(found.add, parts))
    finally:
        sys.setswitchinterval(interval)
    assert found.count == len(numbers)
    wanted = np.sort(numbers).tolist()
    assert [found.at(rank) for rank in range(0, 4000, 37)] == wanted[::37]
    assert found.below(wanted[-1]) == len(numbers) - 1
