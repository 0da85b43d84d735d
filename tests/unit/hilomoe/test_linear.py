"""HiLoMoELinear as a citizen of PyTorch: shapes, dtypes, tracing, copying, saving."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.rounding import (
    assert_same,
    assert_within,
    float64_rounding,
    of_sums,
    rounding_of,
    within,
)
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear, sites_of

OPTIONS = {
    "default": {},
    "top_2": {"top_k": 2},
    "rank_2_norm": {"rank": 2, "query_dim": 5, "query_norm": True},
    "tied": {"tie_keys": True, "query_norm": True},
    "selected": {"query_update": "selected", "stop_gradient": "scores"},
}
RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def trained_site(options=None, **kwargs) -> HiLoMoELinear:
    """A site whose experts say something."""
    torch.manual_seed(0)
    config = HiLoMoEConfig(num_layers=3, num_experts=4, **(options or {}))
    site = HiLoMoELinear(6, 5, config, **kwargs)
    nn.init.normal_(site.expert_out)
    return site


def grads_of(module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    grads = torch.autograd.grad(module(named["x"]).sin().sum(), list(named.values()))
    return {name.removeprefix("_orig_mod."): g for name, g in zip(named, grads, strict=True)}


@every_option
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(options, lead):
    site = trained_site(options)
    x = torch.randn(*lead, 6, requires_grad=True)
    y = site(x)
    y.sum().backward()
    assert y.shape == (*lead, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *site.parameters()])
    rows = site(x.detach().reshape(-1, 6))
    assert_within(y.reshape(-1, 5), rows, rounding_of(site, x))


def test_takes_a_gradient_of_one_expanded_number():
    """As ``sum()`` gives it, where experts are gathered."""
    site = HiLoMoELinear(256, 5, HiLoMoEConfig())
    site(torch.randn(7, 256)).sum().backward()
    assert site.bias is not None
    assert site.bias.grad is not None
    assert site.bias.grad is not None
    assert torch.equal(site.bias.grad, torch.full((5,), 7.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_option
def test_fresh_site_is_its_base_map_to_the_bit(options, dtype):
    site = HiLoMoELinear(48, 40, HiLoMoEConfig(**options), dtype=dtype)
    x = torch.randn(33, 48, dtype=dtype)
    assert torch.equal(site(x), F.linear(x, site.weight, site.bias))


def test_no_active_layer_is_linear_to_the_bit_and_trains_like_it():
    site = trained_site()
    site.active_layers = 0
    plain = nn.Linear(6, 5)
    plain.load_state_dict({"weight": site.weight, "bias": site.bias})
    x = torch.randn(9, 6)
    assert torch.equal(site(x), plain(x))
    site(x).sum().backward()
    plain(x).sum().backward()
    assert site.weight.grad is not None
    assert plain.weight.grad is not None
    assert torch.equal(site.weight.grad, plain.weight.grad)
    assert site.expert_in.grad is None


@pytest.mark.parametrize("layers", [-1, 4])
def test_active_layers_are_bounded(layers):
    message = rf"active_layers must lie between 0 and num_layers = 3, got {layers}\. Build"
    with pytest.raises(ValueError, match=message):
        trained_site().active_layers = layers


def test_same_seed_gives_the_base_of_a_plain_linear():
    torch.manual_seed(3)
    site = HiLoMoELinear(6, 5, HiLoMoEConfig())
    torch.manual_seed(3)
    plain = nn.Linear(6, 5)
    assert torch.equal(site.weight, plain.weight)
    assert site.bias is not None
    assert torch.equal(site.bias, plain.bias)


def test_fresh_layers_are_not_collapsed():
    """Without centred keys, the mean key of a layer would send all rows the same way below."""
    torch.manual_seed(0)
    site = HiLoMoELinear(32, 8, HiLoMoEConfig())
    out = site.compute(0.1 * torch.randn(4096, 32))
    assert out.counts_LE is not None
    assert (out.counts_LE / 4096).max() < 0.35


@pytest.mark.parametrize("training", [True, False])
@every_option
def test_fx_trace(options, training):
    """TorchRec's sparse pipelines trace the model; a branch on a tensor would break them."""
    site = trained_site(options).train(training)
    traced = torch.fx.symbolic_trace(site)
    x = torch.randn(7, 6)
    assert_same(grads_of(traced, x), grads_of(site, x))
    assert torch.equal(traced(x), site(x))


# Dynamo instantiates an autograd.Function while it traces its backward. Goes when it does not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(RELEASE < (2, 12), reason="torch 2.11 loses a site's gradients in a graph")
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_option
def test_compiles_without_graph_breaks(options, training):
    site = trained_site(options).double().train(training)
    torch.compiler.reset()  # compiled code of earlier cases counts towards a limit
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 6).double()
    want = grads_of(site, x)
    assert_within(grads_of(compiled, x), want, float64_rounding(site, x, want))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# Dynamo of torch 2.11 looks for gradients where there are none. Goes with that release.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_host_that_is_compiled_trains_what_it_would_train(training):
    host = nn.Sequential(trained_site({}), nn.Tanh()).double().train(training)
    torch.compiler.reset()
    x = torch.randn(7, 6).double()
    want = grads_of(host, x)
    got = grads_of(torch.compile(host, backend="aot_eager"), x)
    assert_within(got, want, float64_rounding(host, x, want))


@every_option
def test_exports_with_a_free_batch(options):
    if RELEASE < (2, 13) and {"rank", "top_k"} & options.keys():
        pytest.skip("torch before 2.13 cannot prove that min(N, 2 N) is N, and refuses")
    site = trained_site(options).double().eval()
    rows = torch.export.Dim("rows", min=1)
    given = torch.randn(7, 6).double()
    program = torch.export.export(site, (given,), dynamic_shapes={"x": {0: rows}})
    x = torch.randn(11, 6).double()
    assert_within(program.module()(x), site(x), float64_rounding(site, x))


@every_option
def test_deepcopy_and_state_dict(options):
    site, x = trained_site(options), torch.randn(7, 6)
    want = site(x)  # leaves something to read behind, which must not hinder a copy
    assert torch.equal(copy.deepcopy(site)(x), want)
    fresh = HiLoMoELinear(6, 5, site.config)
    fresh.load_state_dict(site.state_dict())
    assert torch.equal(fresh(x), want)
    stored = io.BytesIO()
    torch.save(site.state_dict(), stored)
    stored.seek(0)
    assert set(torch.load(stored, weights_only=True)) == set(dict(site.named_parameters()))


@every_option
def test_meta_construction_then_reset(options):
    site = HiLoMoELinear(6, 5, HiLoMoEConfig(**options), device="meta")
    assert {p.device.type for p in site.parameters()} == {"meta"}
    site.to_empty(device="cpu")
    for p in site.parameters():
        nn.init.constant_(p, torch.nan)
    site.reset_parameters()
    x = torch.randn(7, 6)
    assert torch.equal(site(x), F.linear(x, site.weight, site.bias))
    assert all(p.isfinite().all() for p in site.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@every_option
def test_autocast(options, half):
    site, x = trained_site(options), torch.randn(64, 6)
    with torch.autocast("cpu", dtype=half):
        y = site(x)
    assert y.dtype == half
    y.float().sum().backward()
    # Rows whose choice did not fall to rounding: most. Each of three layers rounds what it adds.
    unit = torch.finfo(half).eps * of_sums(3 * 6)
    near = within(y, site(x), unit * y.abs().max()).all(dim=1)
    assert near.float().mean() > 0.9
    for p in site.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_logits_stay_in_float32_under_autocast():
    site = trained_site()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = site.compute(torch.randn(7, 6)).routing
    assert routing.scores_LEN.dtype == torch.float32
    experts = routing.scores_LEN.shape[1]  # whose scores are quotients by a sum, and are summed up
    unit = of_sums(2 * experts) * torch.finfo(torch.float32).eps
    assert_within(routing.scores_LEN.sum(dim=1), torch.ones(3, 7), unit)


def test_refuses_bad_input():
    site = trained_site()
    with pytest.raises(ValueError, match=r"in_features is 6, but .* last dimension is 4\. Build"):
        site(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"takes a floating-point input, got torch.int64\. Embed"):
        site(torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"in_features must be at least 1, got 0"):
        HiLoMoELinear(0, 5, HiLoMoEConfig())


def test_trains():
    """Experts and routers move, and the loss falls: the start at zero is not a dead end."""
    torch.manual_seed(0)
    model = nn.Sequential(HiLoMoELinear(6, 8, HiLoMoEConfig(num_experts=4)), nn.Linear(8, 1))
    before = {n: p.detach().clone() for n, p in sites_of(model)["0"].expert_parameters().items()}
    x = torch.randn(256, 6)
    target = (x[:, :1] * x[:, 1:2]).sign()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, old in before.items():
        assert not torch.equal(old, sites_of(model)["0"].expert_parameters()[name])
