"""Order statistics against sorting, also when memory holds only a few numbers."""

import numpy as np
import pytest

from torchrec_hilomoe.data.prepare import order_statistics
from torchrec_hilomoe.data.prepare.order_statistics import OrderStatistics


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
