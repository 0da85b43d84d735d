"""Thinned streams have the shares that they promise, and lose no row that they need not lose."""

import math

import numpy as np
import pytest

from benchmarks.experiments.streams import HOUR, HOUR_SHARE, keeps, SHARE
from torchrec_hilomoe.data.synthetic import SyntheticSource


@pytest.mark.parametrize("kind", ["rare", "skewed"])
def test_shares_are_as_promised(kind):
    source = SyntheticSource(world="composed", split="train", rows=65_536, seed=3)
    rng, kept, seen = np.random.default_rng(0), [], 0
    for block in range(len(source.block_rows)):
        table = source.read(0, block)
        chosen = keeps(kind, table, rng)
        clicked = table["label"].to_numpy() == 1
        at_hour = table["hour"].to_numpy() == HOUR
        wanted = clicked if kind == "rare" else at_hour
        always = ~clicked if kind == "rare" else at_hour
        assert chosen[always].all()
        kept.append(wanted[chosen])
        seen += table.num_rows
    share, want = np.concatenate(kept).mean(), SHARE if kind == "rare" else HOUR_SHARE
    # What is drawn is binomial; six standard deviations of the share.
    rows = sum(map(len, kept))
    assert abs(share - want) < 6 * math.sqrt(want * (1 - want) / rows)
    assert rows < seen
