"""Sites of one router, each with a number of layers of its own: none decides for another."""

import copy
import io
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn, Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.rounding import assert_same, assert_within, float64_rounding
from torchrec_hilomoe.hilomoe import (
    auxiliary_loss,
    expert_costs,
    HiLoMoEConfig,
    HiLoMoELinear,
    inject_shared_router,
    remove_hilomoe,
    SampleRouter,
    sites_of,
)
from torchrec_hilomoe.hilomoe.host_watch import stop_watching

WIDTH, ROWS = 16, 5
CONFIG = HiLoMoEConfig(num_layers=3, num_experts=4, balance_weight=0.0, z_weight=0.0)
# How rows meet experts, and where layers are routed: see `Execution`.
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("dense", "scores"): {},
    ("gathered", "scores"): {"num_experts": 64, "query_dim": 100},
    ("gathered", "queries"): {"num_experts": 64},
    ("dense", "queries"): {"num_experts": 64, "top_k": 64, "query_update": "selected"},
}
COUNTS = [(2, 1), (1, 3), (2, 0), (0, 1), (3, 3), (0, 0)]


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


class Host(nn.Module):
    """One query, and two maps that do not hear of each other."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.query, self.up, self.down = Same(), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 3)
        self.again = again

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.query(x)
        if self.again:
            recomputed = partial(checkpoint, use_reentrant=False)
            return recomputed(self.up, x), recomputed(self.down, x)
        return self.up(x), self.down(x)


def host(config: HiLoMoEConfig = CONFIG, again: bool = False) -> Host:
    torch.manual_seed(0)
    model = Host(again).double()
    inject_shared_router(model, config, ["up", "down"], "query", query_width=WIDTH)
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    return model


def site(model: nn.Module, name: str) -> HiLoMoELinear:
    return sites_of(model)[name]


def router(model: nn.Module) -> SampleRouter:
    found = model.get_submodule("hilomoe_router")
    assert isinstance(found, SampleRouter)
    return found


def activate(model: nn.Module, counts: tuple[int, int], last: str = "down") -> nn.Module:
    given = dict(zip(("up", "down"), counts, strict=True))
    for name in sorted(given, key=lambda name: name == last):
        site(model, name).active_layers = given[name]
    return model


def of_own_layers(model: Host, name: str, layers: int) -> Host:
    """The host whose one site has the first layers, and a router that has no others."""
    alone = Host().double()
    if layers:
        config = replace(site(model, name).config, num_layers=layers)
        inject_shared_router(alone, config, [name], "query", query_width=WIDTH)
    state = model.state_dict()
    layered = ("expert_in", "expert_out", "expert_keys")
    own = {
        key: state[key][:layers] if key.endswith(layered) else state[key]
        for key in alone.state_dict()
    }
    alone.load_state_dict(own)
    return alone


def rows(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def found_by(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The output of a map, and its gradients by the input and by all parameters."""
    x = rows().requires_grad_()
    y = model(x)[("up", "down").index(name)]
    parameters = dict(model.named_parameters())
    cotangent = torch.arange(y.numel(), dtype=y.dtype).view_as(y)
    given = [x, *parameters.values()]
    grads = torch.autograd.grad(y, given, cotangent, materialize_grads=True)
    return {"y": y, **dict(zip(["x", *parameters], grads, strict=True))}


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS.items(), ids=[*map("-".join, KINDS)])
def test_each_site_computes_its_own_layers(kind, options, counts):
    """As with a router of its own layers alone, whichever site was told last."""
    model = host(replace(CONFIG, **options))
    assert (site(model, "up").execution.experts, router(model).execution.space) == kind
    for name, layers in zip(("up", "down"), counts, strict=True):
        got = found_by(activate(model, counts, last="up"), name)
        assert_same(found_by(activate(model, counts, last="down"), name), got)
        want = found_by(of_own_layers(model, name, layers), name)
        bound = float64_rounding(model, rows(), *got.values())
        for key, tensor in want.items():
            same = got[key][: len(tensor)]
            assert_within(same, tensor, bound, key)
            assert not got[key][len(tensor) :].any(), key  # layers that the site does not compute


def test_a_router_computes_the_most_that_a_site_asks_for():
    model = host()
    for counts in COUNTS:
        assert router(activate(model, counts)).active_layers == max(counts)
    activate(model, (3, 1))
    stop_watching(model)  # it would hold the site
    model.up = nn.Linear(WIDTH, 6).double()  # a site that is gone asks for nothing
    assert router(model).active_layers == 1
    joined = HiLoMoELinear(WIDTH, 6, CONFIG, router=router(model))
    assert router(model).active_layers == 3
    joined.active_layers = 0
    assert router(model).active_layers == 1
    assert SampleRouter(WIDTH, CONFIG).active_layers == 3  # it has no sites yet


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("ran", [False, True])
def test_copies_ask_for_themselves(copied, ran):
    model = activate(host(), (2, 1))
    if ran:
        model(rows())
    twin = copied(model)
    before = model(rows())
    assert_same(twin(rows()), before)
    for one, other in ((model, twin), (twin, model)):
        activate(one, (0, 0))
        assert (router(one).active_layers, router(other).active_layers) == (0, 2)
        assert_same(other(rows()), before)
        site(one, "down").active_layers = 1
        assert router(one).active_layers == 1
        assert_same(one(rows())[1], before[1])
        activate(one, (2, 1))
        assert_same(one(rows()), before)


def test_a_copy_of_one_site_has_a_router_that_hears_of_it_alone():
    model = activate(host(), (1, 3))
    twin = copy.deepcopy(site(model, "up"))
    assert twin.router is not None
    assert twin.router is not router(model)
    twin.active_layers = 2
    assert twin.router.active_layers == 2
    assert router(model).active_layers == 3


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (0, 2)], ids=str)
def test_traces_and_graphs_have_each_site_s_layers(counts):
    model = activate(host(), counts)
    want = model(rows())
    assert_same(torch.fx.symbolic_trace(model)(rows()), want)
    exported = torch.export.export(model.eval(), (rows(),), strict=False).module()
    assert_within(exported(rows()), want, float64_rounding(model, rows(), *want))


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"),
    reason="torch 2.11 loses a site's gradients in a graph",
)
# Dynamo instantiates an autograd.Function while it traces its backward. Goes when it does not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_hears_of_other_layers():
    model = host()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for counts in ((2, 1), (1, 2), (0, 1)):
        activate(model, counts, last="up")
        want = model(rows())
        assert_within(compiled(rows()), want, float64_rounding(model, rows(), *want))


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (2, 0)], ids=str)
def test_recomputed_sites_have_the_same_gradients(counts):
    options = replace(CONFIG, balance_weight=0.7, z_weight=0.3)
    plain, again = (activate(host(options, again=it), counts) for it in (False, True))
    for name in ("up", "down"):
        assert_same(found_by(again, name), found_by(plain, name))


@pytest.mark.parametrize("counts", [(2, 1), (1, 0)], ids=str)
def test_experts_of_some_layers_become_part_of_the_maps(counts):
    model = activate(host(replace(CONFIG, num_experts=1)), counts)
    want = model(rows())
    bound = float64_rounding(model, rows(), *want)
    assert remove_hilomoe(model) == ["up", "down"]
    assert_within(model(rows()), want, bound)


def test_a_removal_that_is_refused_leaves_the_layers():
    model = activate(host(), (1, 0))
    with pytest.raises(ValueError, match=r"active_layers must be 0 .* got {'up': 1}"):
        remove_hilomoe(model)
    assert router(model).active_layers == 1


def test_counting_costs_leaves_each_site_its_layers():
    model = activate(host(), (1, 2))
    want = model(rows())
    expert_costs(model, lambda: model(rows()), samples=ROWS)
    assert router(model).active_layers == 2
    assert_same(model(rows()), want)


def test_losses_of_layers_that_no_longer_compute_are_forgotten():
    model = activate(host(replace(CONFIG, balance_weight=0.5)), (2, 1))
    model(rows())
    assert auxiliary_loss(model) > 0
    activate(model, (0, 0))
    assert auxiliary_loss(model) == 0
