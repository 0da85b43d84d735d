"""Buckets: where a feature sends each row, as an untrained router would."""

import pytest
import torch

from tests.helpers.probed_hosts import build, FEATURES
from tests.helpers.rounding import assert_same
from torchrec_hilomoe import HiLoMoEConfig, inject_shared_router
from torchrec_hilomoe.hilomoe import SampleRouter
from torchrec_hilomoe.hilomoe.probe.buckets import FeatureBuckets


def test_random_buckets_depend_on_samples_and_pass_alone():
    """So ranks may share the samples in any way."""
    buckets = FeatureBuckets(FEATURES, 8, 2, 0, torch.device("cpu"))
    query = torch.randn(64, 9)
    buckets.prepare(query)

    def anywhere(samples: torch.Tensor, number: int) -> torch.Tensor:
        return buckets(samples, number).bucket_KN[-2:]

    whole = anywhere(query, 5)
    assert_same(torch.cat([anywhere(query[:20], 5), anywhere(query[20:], 5)], dim=1), whole)
    assert not torch.equal(anywhere(query, 6), whole)
    same = anywhere(query[:1].expand(4096, -1), 5)  # equal samples go anywhere, too
    shares = torch.stack([row.bincount(minlength=8) for row in same]) / 4096
    assert float(shares.max()) < 1 / 6


def test_numbers_go_to_their_quantiles():
    buckets = FeatureBuckets(FEATURES, 4, 1, 0, torch.device("cpu"))
    query = torch.zeros(400, 9)
    query[:, 8] = torch.arange(400.0)
    buckets.prepare(query)
    number = list(buckets.names).index("number")
    assert buckets(query, 0).bucket_KN[number].bincount().tolist() == [100] * 4


def number_buckets(values: torch.Tensor, experts: int = 8) -> torch.Tensor:
    """Where one draw puts a number, by quantiles of the same values."""
    buckets = FeatureBuckets(FEATURES, experts, 1, 0, torch.device("cpu"))
    query = torch.zeros(len(values), 9)
    query[:, 8] = values
    buckets.prepare(query)
    return buckets(query, 0).bucket_KN[list(buckets.names).index("number")]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_number_with_few_values_parts_rows_by_them(share):
    """Whichever of them is the common one: quantiles that are equal hide none."""
    values = (torch.arange(400) < share * 400).float()
    found = number_buckets(values)
    assert len(found.unique()) == 2
    assert len(found[values == 1].unique()) == 1
    assert len(number_buckets(values * 0).unique()) == 1


def test_a_number_that_is_missing_hides_no_quantile():
    values = torch.arange(400.0)
    values[7] = torch.nan
    assert int(number_buckets(values).bincount().min()) >= 49


def test_embeddings_go_where_an_untrained_router_sends_them():
    """The same keys, on the same view, choose the same expert."""
    model = build()
    buckets = FeatureBuckets(FEATURES, 4, 1, 0, torch.device("cpu"))
    inject_shared_router(
        model,
        HiLoMoEConfig(num_layers=1, num_experts=4),
        ["first"],
        "features",
        9,
        views=[[range(4)]],
    )
    router = model.hilomoe_router
    assert isinstance(router, SampleRouter)
    with torch.no_grad():
        router.expert_keys[0] = buckets._keys["a"].t()
    query = torch.randn(64, 9)
    buckets.prepare(query)
    assert_same(router(query).chosen_LkN[0, 0], buckets(query, 0).bucket_KN[0].long())
