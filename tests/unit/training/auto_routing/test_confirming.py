"""What experts brought: a weighted mean over batches, and its interval."""

import math

import numpy as np
import torch

from tests.helpers.rounding import rounded
from torchrec_hilomoe.training.auto_routing.confirming import brought_of, sums_of


def test_batches_give_the_mean_and_interval_of_all_their_rows():
    rng = np.random.default_rng(0)
    gains, weights = rng.normal(0.01, 0.1, 60), rng.integers(0, 4, 60).astype(float)
    batches = [slice(0, 7), slice(7, 40), slice(40, 60)]
    parts = [
        sums_of(torch.from_numpy(gains[rows]), torch.from_numpy(weights[rows])) for rows in batches
    ]
    found = brought_of(torch.stack(parts).sum(dim=0), step=7)
    assert found is not None
    mean = math.fsum(weights * gains) / math.fsum(weights)
    error = math.sqrt(math.fsum((weights * (gains - mean)) ** 2)) / math.fsum(weights)
    assert (found.step, found.rows) == (7, np.count_nonzero(weights))
    assert found.gain == rounded(mean, 60, scale=0.1)
    assert found.high - found.gain == rounded(1.96 * error, 240, scale=0.1)
    assert found.gain - found.low == rounded(1.96 * error, 240, scale=0.1)


def test_equal_weights_give_the_standard_error_of_the_mean():
    gains = torch.arange(4, dtype=torch.float64)
    found = brought_of(sums_of(gains, torch.full((4,), 3.0, dtype=torch.float64)), step=0)
    assert found is not None
    assert found.gain == 1.5
    assert found.high - found.gain == rounded(1.96 * gains.numpy().std() / 2, 16)


def test_without_a_row_that_counts_nothing_is_known():
    gains = torch.ones(2, dtype=torch.float64)
    assert brought_of(sums_of(gains, torch.zeros(2, dtype=torch.float64)), step=0) is None
    assert brought_of(sums_of(gains / 0, gains), step=0) is None
