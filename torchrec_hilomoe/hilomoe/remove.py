"""Take experts off a model; what never varies becomes part of the base map.

A row's gates depend on it through the products of its query with the keys alone, and of these on
what differs between a layer's experts. Where nothing differs, whatever the query, every row gets
the same scores; if it also uses all experts, there is no choice left, and the sum over experts is
one map. So it is with a single expert, whose score is 1, and where a layer's keys are equal.

Shape legend:
    L  active expert layers     E  experts     R  rank     Q  query width     D  input width
    O  output width
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.host_checks import (
    carry_over,
    refuse_changed,
    refuse_folding,
    refuse_wrapped,
)
from torchrec_hilomoe.hilomoe.host_watch import stop_watching
from torchrec_hilomoe.hilomoe.inject import routers_of, sites_of
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.routing import score

__all__ = ["experts_never_vary", "remove_hilomoe"]


def remove_hilomoe(model: nn.Module) -> list[str]:
    """Turn sites back into plain linear maps, in place.

    Experts that compute become part of the base map where every row has the same gates: a single
    expert, or all of a layer's experts with equal keys. The weight is then the sum, rounded once.

    Returns:
        The names of the maps.

    Raises:
        ValueError: If the model is wrapped or a site itself; if a site computes with experts that
            differ from row to row, so that removing it would change the model's outputs, or with
            weights that are tied to another map's or on ``meta``; if it is reparametrized or has
            hooks, which a plain map would lose. The model is then as it was.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoEConfig, inject_hilomoe
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = inject_hilomoe(model, HiLoMoEConfig(), sites=["0"])
        >>> for site in sites_of(model).values():
        ...     site.active_layers = 0
        >>> remove_hilomoe(model)
        ['0']
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    refuse_wrapped(model)
    sites = sites_of(model)
    if "" in sites:
        raise ValueError(
            "remove_hilomoe: the model is a site itself, which can only be replaced in a module "
            "that has it. Call remove_hilomoe on that module."
        )
    for name, site in sites.items():
        refuse_changed(name, site, "remove_hilomoe", "removal")
    computing = {name: site for name, site in sites.items() if site.active_layers}
    refuse_folding(model, computing)
    gates = {name: _constant_gates(site) for name, site in computing.items()}
    busy = {name: computing[name].active_layers for name, found in gates.items() if found is None}
    if busy:
        raise ValueError(
            "remove_hilomoe: active_layers must be 0 at every site whose rows have gates of their "
            "own, because removing experts that compute would change the model's outputs; got "
            f"{busy}. Set active_layers = 0 first."
        )
    folded = {
        n: _folded_weight(computing[n], found) for n, found in gates.items() if found is not None
    }
    linears = {site: _linear_of(name, site) for name, site in sites.items()}
    for name, weight in folded.items():
        sites[name].weight.data.copy_(weight)  # what holds the parameter goes on holding it
    places = [*model.named_modules(remove_duplicate=False)]  # a host may use a site in two of them
    stop_watching(model)
    for name, router in routers_of(model).items():
        if isinstance(router, SampleRouter):
            router.detach()
            parent, _, own_name = name.rpartition(".")
            delattr(model.get_submodule(parent), own_name)
    for name, module in places:
        if isinstance(module, HiLoMoELinear):
            model.set_submodule(name, linears[module])
    return list(sites)


def _linear_of(name: str, site: HiLoMoELinear) -> nn.Linear:
    """The plain map of a site, with what hangs on that."""
    linear = nn.Linear(site.in_features, site.out_features, site.bias is not None, device="meta")
    linear.weight = site.weight
    linear.register_parameter("bias", site.bias)
    fresh = HiLoMoELinear(1, 1, site.config, device="meta", router=site.router)
    carry_over(site, linear, fresh, name)
    return linear.train(site.training)


@torch.no_grad()
def _constant_gates(site: HiLoMoELinear) -> Tensor | None:
    """``(L, E)`` in float64, the gates of every row; None where rows may differ."""
    config, layers = site.config, site.active_layers
    if config.top_k < config.num_experts:
        return None
    routes = site if site.router is None else site.router
    keys_LEQ = routes.keys_LEQ()[:layers].double()
    differ_LEQ = keys_LEQ - keys_LEQ[:, :1]
    if config.query_dim is not None:
        differ_LEQ = differ_LEQ @ routes.query_proj.double()
    if differ_LEQ.any():
        return None
    nothing_1Q = keys_LEQ.new_zeros(1, keys_LEQ.shape[2])
    return score(nothing_1Q, keys_LEQ.flatten(0, 1), config).routing.scores_LEN[..., 0]


def experts_never_vary(model: nn.Module) -> bool:
    """Whether all experts of a model that compute can become part of their base maps."""
    sites = [module for module in model.modules() if isinstance(module, HiLoMoELinear)]
    return all(_constant_gates(site) is not None for site in sites if site.active_layers)


@torch.no_grad()
def _folded_weight(site: HiLoMoELinear, gates_LE: Tensor) -> Tensor:
    """``(O, D)``: the base map's weight and what the experts add, rounded once."""
    layers, alpha = site.active_layers, site.config.alpha
    down_LERD = site.expert_in[:layers].double() * gates_LE[..., None, None]
    up_LERO = site.expert_out[:layers].double()
    added_OD = torch.einsum("lero,lerd->od", up_LERO, down_LERD)
    return (site.weight.double() + alpha * added_OD).to(site.weight.dtype)
