"""What experts brought: a weighted mean over batches, and its interval."""

import math

import numpy as np
import torch

from tests.helpers.rounding import rounded
from torchrec_hilomoe.training.auto_routing.confirming import brought_of, sums_of


def test_batches_give_the_mean_and_interval_of_all_their_rows():
    rng = np.random.default_rng(0)
    gains, weights = rng.normal(0.01, 0.1, 600), rng.integers(0, 4, 600).astype(float)
    batches = [slice(0, 7), slice(7, 400), slice(400, 600)]
    parts = [
        sums_of(torch.from_numpy(gains[rows]), torch.from_numpy(weights[rows])) for rows in batches
    ]
    found = brought_of(torch.stack(parts).sum(dim=0), step=7)
    assert found is not None
    mean = math.fsum(weights * gains) / math.fsum(weights)
    error = math.sqrt(math.fsum((weights * (gains - mean)) ** 2)) / math.fsum(weights)
    assert (found.step, found.rows) == (7, np.count_nonzero(weights))
    assert found.gain == rounded(mean, 600, scale=0.1)
    assert found.high - found.gain == rounded(1.96 * error, 2400, scale=0.1)
    assert found.gain - found.low == rounded(1.96 * error, 2400, scale=0.1)


def test_equal_weights_give_the_standard_error_of_the_mean():
    gains = torch.arange(4, dtype=torch.float64).repeat(100)
    found = brought_of(sums_of(gains, torch.full_like(gains, 3.0)), step=0)
    assert found is not None
    assert found.gain == 1.5
    assert found.high - found.gain == rounded(1.96 * gains.numpy().std() / 20, 1600)


def test_too_few_rows_tell_nothing():
    gains = torch.full((99,), -1.0, dtype=torch.float64)
    assert brought_of(sums_of(gains, torch.ones_like(gains)), step=0) is None
    gains = torch.full((1000,), -1.0, dtype=torch.float64)
    one_counts = torch.full_like(gains, 1e-6)
    one_counts[0] = 1.0
    assert brought_of(sums_of(gains, one_counts), step=0) is None
    assert brought_of(sums_of(gains, torch.zeros_like(gains)), step=0) is None
    assert brought_of(sums_of(gains / 0, torch.ones_like(gains)), step=0) is None
    assert brought_of(sums_of(gains, torch.ones_like(gains)), step=0) is not None
