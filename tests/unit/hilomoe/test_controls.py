"""fix_random_routing: the same for the same seed, untouched by training, refused where tied."""

import pytest
import torch
from torch import nn

from torchrec_hilomoe.hilomoe import fix_random_routing, HiLoMoEConfig, inject_hilomoe, sites_of


def model(**options) -> nn.Sequential:
    tower = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    inject_hilomoe(tower, HiLoMoEConfig(num_experts=4, **options), sites=["*"])
    return tower


def test_is_fixed_by_the_seed_and_does_not_train():
    one, other = model(query_dim=3), model(query_dim=3)
    fix_random_routing(one, seed=7)
    fix_random_routing(other, seed=7)
    before = [p.clone() for s in sites_of(one).values() for p in s.routing_parameters().values()]
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        one(torch.randn(9, 6)).sum().backward()
        optimizer.step()
    after = [p for s in sites_of(one).values() for p in s.routing_parameters().values()]
    same = [p for s in sites_of(other).values() for p in s.routing_parameters().values()]
    assert len(before) == 4
    for old, new, twin in zip(before, after, same, strict=True):
        assert torch.equal(old, new)
        assert torch.equal(old, twin)
    assert sites_of(one)["0"].expert_in.grad is not None


def test_refuses_tied_keys():
    with pytest.raises(ValueError, match=r"'0' has tie_keys = True.*tie_keys=False"):
        fix_random_routing(model(tie_keys=True), seed=0)
