"""Counts of values against Python's own, also when memory holds only a few of them."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest

from torchrec_hilomoe.data.prepare import counting
from torchrec_hilomoe.data.prepare.counting import ValueCounts


def skewed(seed: int, rows: int, *, text: bool) -> list:
    values = np.random.default_rng(seed).zipf(1.3, size=rows) % 5000
    return [f"v{value}" if text else int(value) for value in values]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("limit", [50, 1 << 20], ids=["spilling", "in memory"])
def test_matches_a_counter(tmp_path, monkeypatch, limit, text):
    monkeypatch.setattr(counting, "PENDING", 200)
    monkeypatch.setattr(counting, "DISTINCT_IN_MEMORY", limit)
    kind = pl.String if text else pl.Int64
    counts, want = ValueCounts(str(tmp_path), "c", kind=kind), Counter()
    for seed in range(5):
        values = skewed(seed, 3000, text=text)
        want.update(values)
        counts.add(pl.Series([*values, None]))
    for least in (1, 3, 40):
        found = counts.at_least(least)
        got = dict(found.rows())
        assert got == {value: count for value, count in want.items() if count >= least}
    assert bool(list(tmp_path.iterdir())) == (limit == 50)
    ranked = sorted(want, key=lambda value: (-want[value], value))
    assert counts.ranked().to_list() == ranked


def test_threads_may_add_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "PENDING", 200)
    monkeypatch.setattr(counting, "DISTINCT_IN_MEMORY", 100)
    counts = ValueCounts(str(tmp_path), "c")
    lists = [skewed(seed, 2000, text=False) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda values: counts.add(pl.Series(values)), lists))
    want = Counter(value for values in lists for value in values)
    assert counts.at_least(1)["count"].sum() == want.total()


def test_nothing_counted_is_no_value(tmp_path):
    assert ValueCounts(str(tmp_path), "c").at_least(1).height == 0
