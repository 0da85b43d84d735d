"""fix_random_routing: the same for the same seed, untouched by training, refused where tied."""

import pytest
import torch
from torch import nn

from torchrec_hilomoe.backbones.layers.tap import Tap
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    fix_random_routing,
    HiLoMoEConfig,
    inject_hilomoe,
    share_routing,
    sites_of,
)


def model(shared: bool = False, **options) -> nn.Sequential:
    tower = nn.Sequential(Tap(), nn.Linear(6, 4), nn.Linear(4, 1))
    config = HiLoMoEConfig(num_experts=4, **options)
    if shared:
        share_routing(tower, config, ["[12]"], query="0", width=6)
    else:
        inject_hilomoe(tower, config, sites=["[12]"])
    return tower


def routers(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in tower.named_buffers() if name.endswith(("keys", "query_proj"))}


@pytest.mark.parametrize("shared", [False, True])
def test_is_fixed_by_the_seed_and_cannot_be_made_to_train(shared):
    towers = [model(shared, query_dim=3) for _ in range(2)]
    for tower in towers:
        fix_random_routing(tower, seed=7)
    one, other = towers
    before = {name: keys.clone() for name, keys in routers(one).items()}
    assert len(before) == (2 if shared else 4)
    one.requires_grad_(True)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        one(torch.randn(9, 6)).sum().backward()
        optimizer.step()
    for name, keys in routers(one).items():
        assert torch.equal(keys, before[name])
        assert torch.equal(keys, routers(other)[name])
    assert not [name for name in expert_parameters(one) if name.endswith(("keys", "query_proj"))]
    assert sites_of(one)["1"].expert_in.grad is not None


def test_refuses_tied_keys():
    with pytest.raises(ValueError, match=r"'1' has tie_keys = True.*tie_keys=False"):
        fix_random_routing(model(tie_keys=True), seed=0)
