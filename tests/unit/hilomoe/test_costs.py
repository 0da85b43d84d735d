"""What experts cost a host, against counts made by hand."""

import pytest
import torch
from torch import nn

from tests.helpers.hosts import HOSTS, injected, plain, ROWS, rows_of
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import (
    expert_costs,
    expert_parameters,
    Flops,
    remove_hilomoe,
    sites_of,
)

L, E, R, K = 2, 4, 3, 2
CONFIG = HiLoMoEConfig(num_layers=L, num_experts=E, rank=R, top_k=K)
SAMPLES = 16


def products(rows: int, width: int, out: int) -> Flops:
    """A site of dense experts: one product down, one up; logits, and what layers pass on."""
    gram = 2 * (L * E) ** 2 * width
    passing = rows * L * (L - 1) * E**2
    return Flops(
        base=2 * rows * width * out,
        experts=2 * rows * L * E * R * (width + out),
        routing=2 * rows * L * E * width + gram + passing,
    )


def test_a_site_of_rows_that_are_tokens():
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(15, 1))
    inject_hilomoe(model, CONFIG, ["0"])
    model.train()
    found = expert_costs(model, lambda: model(torch.randn(SAMPLES, 3, 6)), samples=SAMPLES)
    (site,) = found.modules
    want = products(3 * SAMPLES, 6, 5)
    assert (site.name, site.rows_per_sample) == ("0", 3)
    assert site.base_parameters == 6 * 5 + 5
    assert site.expert_parameters == L * E * R * (6 + 5)
    assert site.routing_parameters == L * E * 6
    for name in ("base", "experts", "routing"):
        assert getattr(site.flops, name) == round(getattr(want, name) / SAMPLES)
    assert found.model.flops.base == site.flops.base + 2 * 15
    assert found.model.base_parameters == site.base_parameters + 16
    assert found.model.flops.experts == site.flops.experts
    assert model.training
    assert sites_of(model)["0"].active_layers == L


def test_a_shared_router_has_a_line_of_its_own():
    model = nn.ModuleDict({"query": nn.Linear(7, 6), "up": nn.Linear(6, 5)})
    model.forward = lambda x: model["up"](model["query"](x))
    inject_shared_router(model, CONFIG, ["up"], "query", 6)
    found = expert_costs(model, lambda: model(torch.randn(SAMPLES, 7)), samples=SAMPLES)
    site, router = found.modules
    want = products(SAMPLES, 6, 5)
    assert (site.flops.routing, site.routing_parameters) == (0, 0)
    assert site.flops.experts == round(want.experts / SAMPLES)
    assert (router.name, router.rows_per_sample) == ("hilomoe_router", 1)
    assert router.flops == Flops(base=0, experts=0, routing=round(want.routing / SAMPLES))
    assert router.routing_parameters == L * E * 6
    assert found.model.flops.routing == router.flops.routing


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # a host's own
@pytest.mark.parametrize("name", HOSTS)
def test_the_base_is_the_host_without_experts(name):
    """Parameters are all there are; sites that are taken off leave the base's FLOPs."""
    model, batch = injected(HOSTS[name]), rows_of(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = expert_costs(model, lambda: model(*batch), samples=ROWS)
    total, host = found.model, plain(HOSTS[name])
    assert total.base_parameters == sum(p.numel() for p in host.parameters())
    of_experts = sum(p.numel() for p in expert_parameters(model).values())
    assert total.expert_parameters + total.routing_parameters == of_experts
    assert total.flops.experts > 0
    assert total.flops.routing > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for site in sites_of(model).values():
        site.active_layers = 0
    remove_hilomoe(model)
    bare = expert_costs(model, lambda: model(*batch), samples=ROWS).model.flops
    assert bare == Flops(base=total.flops.base, experts=0, routing=0)


def test_a_pass_without_samples_is_refused_and_a_failing_one_leaves_no_trace():
    model = nn.Sequential(nn.Linear(6, 5))
    inject_hilomoe(model, CONFIG, ["0"])
    for samples in (0, "16", 1.5):
        with pytest.raises(ValueError, match=f"samples must be .* at least 1, got {samples!r}"):
            expert_costs(model, lambda: None, samples=samples)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="run must be a function that calls the model, got a Ten"):
        expert_costs(model, torch.randn(2, 6), samples=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="computed no product of matrices"):
        expert_costs(model, lambda: None, samples=2)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="in_features"):
        expert_costs(model, lambda: model(torch.randn(2, 9)), samples=2)
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
    found = expert_costs(model, lambda: model(torch.randn(2, 6)), samples=2)
    assert found.modules[0].rows_per_sample == 1


def test_passes_see_the_same_random_rows_and_the_host_draws_its_own():
    model = nn.Sequential(nn.Linear(6, 5))
    inject_hilomoe(model, CONFIG, ["0"])
    rows = []

    def run() -> None:
        rows.append(torch.randn(int(torch.randint(2, 99, ())), 6))
        model(rows[-1])

    before = torch.get_rng_state()
    assert expert_costs(model, run, samples=1).model.flops.routing > 0
    assert all(torch.equal(again, rows[0]) for again in rows)
    assert torch.equal(torch.get_rng_state(), before)
