"""A site's operators as PyTorch's checks, counters and transforms see them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.rounding import assert_same, assert_within, float64_rounding
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear, inject_hilomoe, operators
from torchrec_hilomoe.hilomoe.execution import execution_for
from torchrec_hilomoe.hilomoe.inject import auxiliary_loss, inject_shared_router
from torchrec_hilomoe.hilomoe.losses import LossWeights

ROWS, D, O = 7, 6, 5  # noqa: E741
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_2": {"num_experts": 4, "rank": 3, "top_k": 2, "stop_gradient": "scores"},
    "selected": {"num_experts": 4, "query_dim": 3, "query_update": "selected"},
    "tied": {"num_experts": 4, "tie_keys": True, "query_norm": True, "stop_gradient": "query"},
    "one_layer": {"num_layers": 1, "num_experts": 33, "alpha": 0.5},
    "moved": {"num_experts": 64},
    "moved_selected": {"num_experts": 64, "query_dim": 3, "query_update": "selected"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
FAST = ("default", "moved")
NEEDS = (True, True, True)


def calls(config: HiLoMoEConfig, width: int = D, **needs: bool) -> dict[Any, tuple]:
    """Each kernel and what it could be called with, but for config and execution."""
    torch.manual_seed(0)
    L, E, R, Q = config.num_layers, config.num_experts, config.rank, config.query_dim or width
    x, weight, bias = torch.randn(ROWS, width), torch.randn(O, width), torch.randn(O)
    query = torch.randn(ROWS, Q) if config.query_dim or config.query_norm else None
    down, up, keys = (torch.randn(L, E, *shape) for shape in ((R, width), (R, O), (Q,)))
    own_keys = None if config.tie_keys else keys
    execution = execution_for(config, width)
    site = (x, query, weight, bias, down, up, own_keys)
    found = operators.site(config, execution, *site)
    y, counts, memory, gates, chosen, scores, logsumexp, slots, hidden = found
    mixed = (x, weight, bias, down, up, gates, chosen)
    routing = (memory, gates, chosen, scores, logsumexp)
    q = x if query is None else query
    need_x = needs.get("x", True)
    return {
        operators.site: site,
        operators.site_backward: (
            torch.randn_like(y),
            [x, query, weight, down, up, own_keys, counts, *routing, slots, hidden],
            LossWeights(balance=0.1, z=0.2, ranks=1.0),
            [need_x, query is not None, needs.get("weight", True), True],
        ),
        operators.route: (q, keys),
        operators.route_backward: (
            torch.randn_like(gates), [q, keys, *operators.route(config, execution, q, keys)], None
        ),
        operators.mixed: mixed,
        operators.mixed_backward: (
            torch.randn_like(y), [x, weight, down, up, gates, slots, hidden], [need_x, True, True]
        ),
    }  # fmt: skip


def operator_call(kernel: Any, config: HiLoMoEConfig, width: int = D) -> tuple[Any, str]:
    return operators.operator(kernel), operators.options_of(config, execution_for(config, width))


# Seconds each: the fast ones are of one kernel each.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=[] if name in FAST else pytest.mark.slow, id=name)
        for name, options in OPTIONS.items()
    ],
)
def test_pytorch_finds_no_fault(options):
    """No output is an input, none is written to; shapes without numbers are right."""
    config = HiLoMoEConfig(**options)
    for kernel, args in calls(config).items():
        operator, text = operator_call(kernel, config)
        torch.library.opcheck(operator, (text, *args))


def test_pytorch_finds_no_fault_where_experts_are_gathered():
    config = HiLoMoEConfig()
    assert execution_for(config, 128).experts == "gathered"
    for kernel, args in calls(config, 128).items():
        operator, text = operator_call(kernel, config, 128)
        torch.library.opcheck(operator, (text, *args))


@pytest.mark.parametrize("needs", [{}, {"x": False}, {"weight": False}], ids=str)
@every_option
def test_flops_are_those_of_the_products_that_are_computed(options, needs):
    config = HiLoMoEConfig(**options)
    execution = execution_for(config, D)
    gathers = execution.space == "queries" and config.query_update == "selected"
    for kernel, args in calls(config, **needs).items():
        if gathers and kernel not in (operators.mixed, operators.mixed_backward):
            continue  # PyTorch does not count its embedding bags
        operator, text = operator_call(kernel, config)
        with FlopCounterMode(display=False) as formula:
            operator(text, *args)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as seen:
            kernel(config, execution, *args)
        assert formula.get_total_flops() == seen.get_total_flops(), kernel.__name__


def added(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def test_gathered_experts_count_what_a_row_chooses():
    config = HiLoMoEConfig(num_experts=16, top_k=2)
    operator, text = operator_call(operators.mixed, config, 128)
    assert execution_for(config, 128).experts == "gathered"
    args = calls(config, 128)[operators.mixed]
    with FlopCounterMode(display=False) as counter:
        operator(text, *args)
    chosen = config.num_layers * config.top_k
    assert counter.get_total_flops() == 2 * ROWS * (128 * O + chosen * (128 + O))


def trained_site(options: dict[str, Any]) -> HiLoMoELinear:
    torch.manual_seed(0)
    site = HiLoMoELinear(D, O, HiLoMoEConfig(**options)).double()
    nn.init.normal_(site.expert_out)
    return site


def examples(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64)


@every_option
def test_vmap_is_a_call_for_each_example(options):
    site, x = trained_site(options), examples(ROWS, D)
    assert_same({"y": torch.vmap(site)(x)}, {"y": torch.stack([site(one) for one in x])})


@every_option
def test_gradients_of_single_examples(options):
    """As differential privacy takes them, in training, so the auxiliary losses are in them."""
    site, x = trained_site(options), examples(ROWS, D)
    parameters = dict(site.named_parameters())

    def lost(parameters: Mapping[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(site, dict(parameters), one).sin().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    got = torch.vmap(torch.func.grad(lost), in_dims=(None, 0))(detached, x)
    want = [torch.autograd.grad(lost(parameters, one), list(parameters.values())) for one in x]
    want = dict(zip(parameters, map(torch.stack, zip(*want, strict=True)), strict=True))
    if "query_proj" in want:  # PyTorch's own product, which vmap computes for all examples at once
        batched, alone = got.pop("query_proj"), want.pop("query_proj")
        assert_within(batched, alone, float64_rounding(site, x, alone))
    assert_same(got, want)


def test_an_ensemble_of_sites():
    sites, x = [trained_site({}) for _ in range(3)], examples(D)[0].expand(2, D)
    for at, site in enumerate(sites):
        nn.init.normal_(site.expert_out, mean=at)
    stacked, _ = torch.func.stack_module_state(sites)
    got = torch.vmap(lambda one: functional_call(sites[0], one, x))(stacked)
    assert_same({"y": got}, {"y": torch.stack([site(x) for site in sites])})


def test_a_transform_leaves_no_loss_behind():
    """A tensor of a transform that is over cannot be read."""
    model = nn.Sequential(nn.Linear(D, O))
    inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
    x = torch.randn(ROWS, D)
    model(x)
    want = auxiliary_loss(model)
    torch.vmap(model)(torch.randn(3, ROWS, D))
    torch.func.grad(lambda x: model(x).sum())(torch.randn(ROWS, D))
    assert torch.equal(auxiliary_loss(model), want)


def dual(site: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        site(forward_ad.make_dual(x, x))


# PyTorch 2.14 scripts decompositions of its own when forward mode is first asked for.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "take",
    [
        lambda site, x: torch.func.jvp(site, (x,), (x,)),
        lambda site, x: torch.func.jacfwd(site)(x),
        dual,
    ],
    ids=["jvp", "jacfwd", "forward_ad"],
)
def test_refuses_forward_mode(take):
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*Use reverse mode"):
        take(trained_site({}), examples(D)[:2].reshape(2, D))


def test_refuses_to_be_differentiated_twice():
    site, x = trained_site({}), examples(D)

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: site(x).sin().sum())(x).sum()

    with pytest.raises(NotImplementedError, match="once, not twice. Keep second derivatives"):
        torch.func.grad(slope)(x)


class Host(nn.Module):
    """A site behind a map whose output routes it, if it is shared."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.query, self.up = nn.Linear(D, D), nn.Linear(D, 2)
        config = HiLoMoEConfig(num_layers=2, num_experts=3)
        if shared:
            inject_shared_router(self, config, ["up"], "query", query_width=D)
        else:
            inject_hilomoe(self, config, ["up"])
        nn.init.normal_(self.get_parameter("up.expert_out"))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.query(x)).sin()


@pytest.mark.parametrize("shared", [False, True])
def test_refuses_a_second_gradient_by_whatever_it_is_taken(shared):
    """As a gradient penalty takes one: parts of it would be missing without a word."""
    host, x = Host(shared), torch.randn(4, D, requires_grad=True)
    (grad,) = torch.autograd.grad(host(x).sum(), x, create_graph=True)
    for leaf in (x, *host.parameters()):
        with pytest.raises(NotImplementedError, match=r"create_graph=True returned, .*sites"):
            torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        (host(x).sum() + grad.square().sum()).backward()


def test_a_first_gradient_that_is_recorded_is_the_same():
    host, x = Host(shared=True), torch.randn(4, D, requires_grad=True)
    leaves = [x, *host.parameters()]
    want = torch.autograd.grad(host(x).sum(), leaves)
    got = torch.autograd.grad(host(x).sum(), leaves, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_no_example(shared):
    host = Host(shared)
    assert torch.vmap(host)(torch.randn(0, 3, D)).shape == (0, 3, 2)
    assert torch.vmap(host, in_dims=1)(torch.randn(3, 0, D)).shape == (0, 3, 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_runs_without_memory(shared, training):
    """On the device meta, as estimates of memory and shapes do; it has no autocast."""
    host, x = Host(shared).to("meta").train(training), torch.randn(3, D, device="meta")
    assert host(x).shape == (3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = host(x)
    assert (y.shape, y.is_meta) == ((3, 2), True)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in host.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda host: torch.jit.trace(host, torch.randn(3, D))]
)
def test_torchscript_is_refused_with_the_way_that_works(compiled, shared):
    for host in (Host(shared), nn.Sequential(Host(shared))):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script or .*torch\.export\."):
            compiled(host)
