"""remove_hilomoe where experts never vary: they become part of the base map."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    fix_random_routing,
    remove_hilomoe,
    sites_of,
)

WIDTH = 6
ALL: dict[str, Any] = {"num_experts": 3, "top_k": 3}


class Host(nn.Module):
    """A query, and two maps that it may route."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.first = nn.Identity(), nn.Linear(WIDTH, 5)
        self.last = nn.Linear(5, WIDTH, bias=False)

    def forward(self, x):
        return self.last(self.first(self.query(x)).tanh())


def grown(shared: bool, options: dict[str, Any], change: str = "") -> Host:
    """A host whose experts add something; ``change`` names keys that are made equal or zero."""
    torch.manual_seed(0)
    model = Host().double()
    config = HiLoMoEConfig(**{"num_layers": 2, "rank": 1, "alpha": 0.7, **options})
    if shared:
        inject_shared_router(model, config, ["first", "last"], "query", WIDTH)
    else:
        inject_hilomoe(model, config, ["first", "last"])
    with torch.no_grad():
        for site in sites_of(model).values():
            site.expert_out.normal_()
        for name, parameter in expert_parameters(model).items():
            if change and name.endswith(change):
                equal = parameter[:, :1] if change != "query_proj" else torch.zeros(1)
                parameter.copy_(equal.expand_as(parameter).clone())
    return model


def rows() -> torch.Tensor:
    return torch.randn(9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CONSTANT = {
    "one expert": (False, {"num_experts": 1}, ""),
    "one expert of rank 3": (False, {"num_experts": 1, "rank": 3}, ""),
    "one expert, tied keys": (False, {"num_experts": 1, "tie_keys": True}, ""),
    "one expert, a query of its own": (False, {"num_experts": 1, "query_dim": 2}, ""),
    "one expert, a shared router": (True, {"num_experts": 1}, ""),
    "equal keys": (False, ALL, "expert_keys"),
    "equal keys of a shared router": (True, ALL, "expert_keys"),
    "equal tied keys": (False, {**ALL, "tie_keys": True}, "expert_in"),
    "a query of zeros": (False, {**ALL, "query_dim": 2, "query_norm": True}, "query_proj"),
    "a query of zeros that moves": (True, {**ALL, "query_dim": 2}, "query_proj"),
}


@pytest.mark.parametrize("case", CONSTANT.values(), ids=CONSTANT)
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_stay_and_so_do_parameters(case, layers):
    model = grown(*case)
    for site in sites_of(model).values():
        site.active_layers = layers
    base = {name: model.get_submodule(name).weight for name in ("first", "last")}
    before, largest = model(rows()), copy.deepcopy(model)
    assert remove_hilomoe(model) == ["first", "last"]
    assert {name for name, _ in model.named_parameters()} == set(Host().state_dict())
    for name, weight in base.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert model.get_submodule(name).weight is weight
    assert_within(model(rows()), before, float64_rounding(largest, model, rows(), before))


VARYING = {
    "keys that differ": (False, ALL, ""),
    "a choice between equals": (False, {"num_experts": 3, "top_k": 1}, "expert_keys"),
    "a shared router": (True, ALL, ""),
}


@pytest.mark.parametrize("case", VARYING.values(), ids=VARYING)
def test_experts_that_may_vary_are_refused_and_all_stays(case):
    model = grown(*case)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="got {'first': 2, 'last': 2}. Set active_layers = 0"):
        remove_hilomoe(model)
    assert list(sites_of(model)) == ["first", "last"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_one_site_that_varies_keeps_the_others_as_they_were():
    model = grown(False, {"num_experts": 1})
    weight = model.first.weight.clone()
    sites_of(model)["last"].config = HiLoMoEConfig(num_layers=2, num_experts=2)
    with pytest.raises(ValueError, match="got {'last': 2}"):
        remove_hilomoe(model)
    assert torch.equal(model.first.weight, weight)


def test_a_fixed_router_of_one_expert_folds():
    model = grown(False, {"num_experts": 1})
    fix_random_routing(model, seed=0)
    before = model(rows())
    remove_hilomoe(model)
    assert_within(model(rows()), before, float64_rounding(model, rows(), before))


def test_a_weight_that_is_used_elsewhere_is_not_folded_into():
    model = grown(False, {"num_experts": 1})
    model.other = nn.Linear(WIDTH, 5)
    model.other.weight = model.first.weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'first' is tied: other\.weight would get .* active_lay"):
        remove_hilomoe(model)
    assert list(sites_of(model)) == ["first", "last"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for site in sites_of(model).values():
        site.active_layers = 0
    assert remove_hilomoe(model) == ["first", "last"]


@pytest.mark.parametrize("options", [{"num_experts": 1}, ALL])
def test_nothing_is_folded_on_meta(options):
    model = grown(False, options).to("meta")
    with pytest.raises(ValueError, match="'first' is on meta, .* active_layers = 0 first, or load"):
        remove_hilomoe(model)
    assert list(sites_of(model)) == ["first", "last"]


def test_a_site_in_two_places_is_folded_once():
    model = grown(False, {"num_experts": 1})
    model.again = model.first
    before, largest = model(rows()), copy.deepcopy(model)
    remove_hilomoe(model)
    assert model.again is model.first
    assert_within(model(rows()), before, float64_rounding(largest, model, rows(), before))
