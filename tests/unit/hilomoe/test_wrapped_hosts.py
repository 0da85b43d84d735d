"""Hosts that are wrapped: refused, or told what to set."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.towers import CONFIG, tower
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    inject_hilomoe,
    inject_shared_router,
    sites_of,
)


def wrapped() -> dict[str, str]:
    messages = {}
    wrappers = {
        "fully_shard": fully_shard,
        "FSDP1": partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
        "DataParallel": DataParallel,
        "DDP": DistributedDataParallel,
    }
    for name, wrap in wrappers.items():
        model = wrap(tower())
        with pytest.raises(ValueError, match="already distributed") as caught:
            inject_hilomoe(model, CONFIG, ["*0"])
        messages[name] = str(caught.value)
    model = nn.Sequential(tower())
    fully_shard(model)
    with pytest.raises(ValueError, match="already distributed") as caught:
        inject_hilomoe(model[0], CONFIG, ["0"])
    messages["inside"] = str(caught.value)
    return messages


def test_refuses_wrapped_models():
    (messages,) = run_ranks(wrapped, 1)
    for name, shown in (
        ("fully_shard", "its root is a FSDPSequential"),
        ("FSDP1", "its root is a FullyShardedDataParallel"),
        ("DataParallel", "its root is a DataParallel"),
        ("DDP", "its root is a DistributedDataParallel"),
        ("inside", "'0' is already distributed: its weight is a DTensor"),
    ):
        assert shown in messages[name]
        assert "first, then" in messages[name]


def under_ddp(find_unused: bool, frozen: bool) -> str:
    torch.manual_seed(0)
    model = tower()
    inject_hilomoe(model, CONFIG, ["0"])
    for site in sites_of(model).values():
        site.active_layers = 0
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(not frozen)
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD([p for p in ddp.parameters() if p.requires_grad], lr=0.1)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            ddp(torch.randn(8, 6) + dist.get_rank()).square().mean().backward()
            optimizer.step()
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(("find_unused", "frozen"), [(False, True), (True, False)])
def test_no_active_layers_under_ddp(find_unused, frozen):
    assert run_ranks(under_ddp, 2, find_unused, frozen) == ["trained"] * 2


def test_no_active_layers_under_ddp_with_learning_experts_is_refused():
    for message in run_ranks(under_ddp, 2, False, False):
        assert "active_layers is 0 at 0, whose experts have requires_grad = True" in message
        assert "before the model is wrapped" in message
        assert "find_unused_parameters=True" in message


class Halves(nn.Module):
    """Two parts, routed by what both read."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Identity()
        self.first, self.last = tower(), tower()

    def forward(self, x):
        query = self.query(x)
        return self.first(query) + self.last(query)


def a_part_under_ddp(shared: bool, whole: bool) -> str:
    torch.manual_seed(0)
    model = Halves()
    if shared:
        inject_shared_router(model, CONFIG, ["*0"], "query", 6)
    else:
        inject_hilomoe(model, CONFIG, ["*0"])
    if whole:
        host = DistributedDataParallel(model)
    else:
        host = model
        model.set_submodule("first", DistributedDataParallel(model.first))
    try:
        host(torch.randn(8, 6) + dist.get_rank()).square().mean().backward()
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(("shared", "whole"), [(True, True), (False, False)])
def test_ddp_around_all_that_shares_a_router_or_around_a_part_that_shares_none(shared, whole):
    assert run_ranks(a_part_under_ddp, 2, shared, whole) == ["trained"] * 2


def test_ddp_around_some_of_a_router_s_sites_is_refused():
    for message in run_ranks(a_part_under_ddp, 2, True, False):
        assert "Site 'first.module.0' is in the DistributedDataParallel 'first'" in message
        assert "the router 'hilomoe_router' that it shares is not" in message
        assert "Wrap the model as a whole" in message
