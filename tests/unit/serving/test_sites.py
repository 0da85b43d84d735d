"""A package's sites compute what the trained ones do, and are gone when it is made."""

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, rounding_of
from tests.helpers.site_cases import config_of, make_case, OPTIONS
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear, inject_shared_router
from torchrec_hilomoe.serving.sites import served_sites, ServedSite

SIZES = (40, 6, 5, 3, 4)  # rows, widths, layers, experts


def trained(bias=True, **options):
    """A site whose parameters are anything, in evaluation."""
    config = config_of(3, 4, **options)
    site, tensors, _ = make_case(SIZES, config, torch.float64, bias=bias)
    site.load_state_dict({name: value for name, value in tensors.items() if name != "x"})
    return site.eval(), tensors["x"]


def same(site, x, served=None):
    served = served or ServedSite(site)
    with torch.no_grad():
        assert_within(served(x), site(x), rounding_of(site, x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_every_option(options):
    same(*trained(**options))


@pytest.mark.parametrize("options", [{}, {"query_dim": 3}, {"query_norm": True}], ids=str)
def test_without_a_bias_for_fewer_layers_and_for_rows_of_any_shape(options):
    site, x = trained(bias=False, **options)
    same(site, x.view(4, 2, 5, 6))
    same(site, x[:0])
    site.active_layers = 2
    same(site, x)


def test_equal_logits_choose_the_first_expert():
    site, x = trained(top_k=2)
    with torch.no_grad():
        site.expert_keys[:] = site.expert_keys[:, :1]
    same(site, x)


def test_sites_are_put_back_also_when_tracing_fails_and_others_stay():
    config, crowded = HiLoMoEConfig(), HiLoMoEConfig(num_experts=32)
    host = nn.ModuleDict({"user": nn.Linear(8, 6), "routed": nn.Linear(6, 6)})
    inject_shared_router(host, config, ["routed"], "user", 6)
    host["own"] = HiLoMoELinear(8, 8, config)
    host["crowded"] = host["again"] = HiLoMoELinear(8, 4, crowded)
    before = [*host.named_modules(remove_duplicate=False)]
    others = [it for it in (host["routed"], host["crowded"]) if isinstance(it, HiLoMoELinear)]
    executions = [site.execution for site in others]
    assert executions[1].space == "queries"

    def fail():
        assert isinstance(host["own"], ServedSite)
        assert [host["routed"], host["crowded"]] == [host["routed"], host["again"]] == others
        assert {site.execution.experts for site in others} == {"indexed"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), served_sites(host):
        fail()
    assert [*host.named_modules(remove_duplicate=False)] == before
    assert [site.execution for site in others] == executions
