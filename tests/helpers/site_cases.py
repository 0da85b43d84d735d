"""A site, what it is asked, and the float64 loops that say whether it is right."""

import torch
from torch.func import functional_call

from tests.helpers.rounding import assert_as_exact_as, of_sums, value_and_grads
from torchrec_hilomoe.hilomoe import HiLoMoEConfig, HiLoMoELinear, reference

__all__ = ["OPTIONS", "check", "chosen_by", "config_of", "make_case"]

OPTIONS = {
    "default": {},
    "top_2": {"top_k": 2},
    "all_chosen": {"top_k": 4},
    "rank_3": {"rank": 3},
    "query_dim": {"query_dim": 3},
    "query_norm": {"query_norm": True},
    "query_dim_norm": {"query_dim": 3, "query_norm": True},
    "tied": {"tie_keys": True},
    "tied_norm": {"tie_keys": True, "query_norm": True},
    "selected": {"query_update": "selected"},
    "selected_top_2": {"query_update": "selected", "top_k": 2, "rank": 2},
    "stop_scores": {"stop_gradient": "scores"},
    "stop_scores_selected": {"stop_gradient": "scores", "query_update": "selected"},
    "stop_query": {"stop_gradient": "query"},
    "stop_query_dim_norm": {"stop_gradient": "query", "query_dim": 3, "query_norm": True},
    "alpha": {"alpha": -0.3},
    "no_losses": {"balance_weight": 0.0, "z_weight": 0.0},
    "balance_only": {"z_weight": 0.0},
    "z_only": {"balance_weight": 0.0},
}


def config_of(L, E, **options):
    options = {"balance_weight": 0.7, "z_weight": 0.3, "alpha": 0.7, **options}
    options["top_k"] = min(options.get("top_k", 1), E)
    return HiLoMoEConfig(num_layers=L, num_experts=E, **options)


def make_case(sizes, config, dtype, seed=0, bias=True):
    """A site in training mode, its inputs and parameters by name, and an output gradient."""
    N, D, width, _, _ = sizes
    rng = torch.Generator().manual_seed(seed)
    site = HiLoMoELinear(D, width, config, bias=bias, dtype=dtype)
    tensors = {"x": torch.randn(N, D, generator=rng).to(dtype)}
    for name, p in site.named_parameters():  # up-vectors start at zero and would hide errors
        tensors[name] = torch.randn(p.shape, generator=rng).to(dtype)
    return site, tensors, torch.randn(N, width, generator=rng).to(dtype)


def check(sizes, config, dtype, seed=0, bias=True, active_layers=None, device="cpu"):
    """Compare a site on ``device`` with the loops on the CPU: the output and every gradient."""
    site, tensors, cotangent = make_case(sizes, config, dtype, seed, bias)
    site.to(device)
    if active_layers is not None:
        site.active_layers = active_layers
    chosen_NLE = chosen_by(site, tensors) if site.active_layers else None

    def fast(x, **params):
        return functional_call(site, params, (x,)), None  # the loss is attached to the output

    def slow(x, **params):
        out = reference.hilomoe_linear(x, params, config, active_layers, chosen_NLE)
        return out.y_NO, reference.losses(out, config).total if active_layers != 0 else None

    exact = {name: t.double() for name, t in tensors.items()}
    plain = {name: t.float() for name, t in tensors.items()} if dtype.itemsize == 8 else tensors
    want = value_and_grads(slow, exact, cotangent.double())
    near = value_and_grads(slow, plain, cotangent.to(plain["x"].dtype))
    there = {name: t.to(device) for name, t in tensors.items()}
    got = value_and_grads(fast, there, cotangent.to(device))
    here = {name: t.cpu() for name, t in got.items()}
    assert_as_exact_as(here, near, want, dtype, sum(sizes))


def chosen_by(site, tensors):
    """The experts that the site chooses; each must be among the best to within rounding."""
    params = {name: t for name, t in tensors.items() if name != "x"}
    there = {f"site.{name}": p.to(site.weight.device) for name, p in params.items()}
    with torch.no_grad():
        x = tensors["x"].to(site.weight.device)
        routing = functional_call(_Routing(site), there, (x,))
    chosen_LEN = torch.zeros_like(routing.scores_LEN, dtype=torch.bool)
    chosen_NLE = chosen_LEN.scatter(1, routing.chosen_LkN, True).permute(2, 0, 1).cpu()
    config, dtype = site.config, tensors["x"].dtype
    exact = {name: t.double() for name, t in params.items()}
    out = reference.hilomoe_linear(
        tensors["x"].double(), exact, config, site.active_layers, chosen_NLE
    )
    plain = reference.hilomoe_linear(tensors["x"], params, config, site.active_layers, chosen_NLE)
    unit = 1 if dtype.itemsize < 8 else 4
    slack = 2 * (plain.logits_NLE.double() - out.logits_NLE).abs().max() * unit
    largest = out.logits_NLE.abs().max()
    slack += of_sums(sum(tensors["x"].shape)) * torch.finfo(dtype).eps * largest
    worst_chosen = out.logits_NLE.masked_fill(~chosen_NLE, torch.inf).amin(dim=2)
    best_other = out.logits_NLE.masked_fill(chosen_NLE, -torch.inf).amax(dim=2)
    assert (chosen_NLE.sum(dim=2) == config.top_k).all()
    assert (worst_chosen >= best_other - 2 * slack).all()
    return chosen_NLE


class _Routing(torch.nn.Module):
    """Calls ``site.compute`` where ``functional_call`` wants a ``forward``."""

    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        return self.site.compute(x).routing
