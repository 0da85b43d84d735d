"""Experts that never vary, as part of the base map.

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

from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.routing import score

__all__ = ["constant_gates", "experts_never_vary", "folded_weight"]


@torch.no_grad()
def constant_gates(site: HiLoMoELinear) -> Tensor | None:
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
    return all(constant_gates(site) is not None for site in sites if site.active_layers)


@torch.no_grad()
def folded_weight(site: HiLoMoELinear, gates_LE: Tensor) -> Tensor:
    """``(O, D)``: the base map's weight and what the experts add, rounded once."""
    layers, alpha = site.active_layers, site.config.alpha
    down_LERD = site.expert_in[:layers].double() * gates_LE[..., None, None]
    up_LERO = site.expert_out[:layers].double()
    added_OD = torch.einsum("lero,lerd->od", up_LERO, down_LERD)
    return (site.weight.double() + alpha * added_OD).to(site.weight.dtype)
