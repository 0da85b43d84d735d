"""remove_hilomoe where a site is not as injection has made it: refused, and all stays."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.helpers.towers import CONFIG, tower
from torchrec_hilomoe.hilomoe import (
    HiLoMoELinear,
    inject_hilomoe,
    inject_shared_router,
    remove_hilomoe,
    sites_of,
)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = tower(), nn.Linear(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.first(x))


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "of the experts": lambda site: parametrizations.weight_norm(site, "expert_keys"),
}
HOOKED = {
    "pruned": lambda site: prune.l1_unstructured(site, "weight", 0.5),
    "a pruned bias": lambda site: prune.l1_unstructured(site, "bias", 0.5),
    "pruned experts": lambda site: prune.l1_unstructured(site, "expert_in", 0.5),
    "the old spectral_norm": nn.utils.spectral_norm,
    "a listener": lambda site: site.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (change, r"is reparametrized: its .*remove_parametrizat")
            for change in PARAMETRIZED.values()
        ),
        *(
            (change, r"has 1 forward(-pre)? hook\(s\) .*after removal")
            for change in HOOKED.values()
        ),
    ],
    ids=[*PARAMETRIZED, *HOOKED],
)
def test_a_changed_site_is_refused_and_all_stays(change, message):
    model = tower()
    inject_hilomoe(model, CONFIG, ["0", "2"])
    change(sites_of(model)["2"])
    for site in sites_of(model).values():
        site.active_layers = 0
    modules, names, x = [*model.modules()], [*model.state_dict()], torch.randn(3, 6)
    want = model.eval()(x)
    with pytest.raises(ValueError, match=rf"remove_hilomoe: '2' {message}"):
        remove_hilomoe(model)
    assert [*model.modules()] == modules
    assert [*model.state_dict()] == names
    assert torch.equal(model(x), want)


def test_a_weight_that_is_no_parameter_is_refused():
    model = tower()
    inject_hilomoe(model, CONFIG, ["0"])
    site = sites_of(model)["0"]
    site.active_layers = 0
    weight = site.weight.detach()
    del site.weight
    site.register_buffer("weight", weight)
    with pytest.raises(ValueError, match=r"'0' has a Tensor as its weight, where an nn.Param"):
        remove_hilomoe(model)
    assert sites_of(model)


def test_a_shared_router_stays_with_a_site_that_is_refused():
    model = Host()
    inject_shared_router(model, CONFIG, ["up"], "first", query_width=1)
    site = sites_of(model)["up"]
    site.active_layers = 0
    parametrizations.weight_norm(site)
    with pytest.raises(ValueError, match="reparametrized"):
        remove_hilomoe(model)
    site.active_layers = 2
    assert model(torch.randn(3, 6)).isfinite().all()


def test_a_site_in_two_places_is_removed_from_both():
    model = nn.ModuleDict({"a": nn.Linear(6, 5)})
    inject_hilomoe(model, CONFIG, ["a"])
    model["b"] = model["a"]
    sites_of(model)["a"].active_layers = 0
    assert remove_hilomoe(model) == ["a"]
    assert type(model["a"]) is nn.Linear
    assert model["b"] is model["a"]


def test_a_model_that_is_a_site_is_refused():
    site = HiLoMoELinear(6, 5, CONFIG)
    site.active_layers = 0
    with pytest.raises(ValueError, match=r"the model is a site itself, .*on that module"):
        remove_hilomoe(site)
