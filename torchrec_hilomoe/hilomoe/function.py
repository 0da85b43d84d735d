"""A site's forward and backward as one autograd function, written by hand.

Autograd would keep every intermediate of the routing and build one ``(N, D)`` gradient for each of
the input's uses. Here the forward keeps the scores and the chosen hidden values, the backward
recomputes the rest, and all parts of the input's gradient are added up in one buffer.

Shape legend:
    N  rows     D  input width     O  output width    Q  query width
    L  expert layers     E  experts     R  rank     k  experts chosen
    M  experts of all layers, L E       H  their vectors, L E R      S  those a row uses, L k R
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.experts import WAYS
from torchrec_hilomoe.hilomoe.losses import choice_counts, loss_gradients, sum_over_ranks
from torchrec_hilomoe.hilomoe.plan import Plan
from torchrec_hilomoe.hilomoe.routing import (
    route,
    route_backward,
    Routing,
    wide,
)

__all__ = ["SiteOutput", "hilomoe"]


@dataclass(frozen=True, kw_only=True)
class SiteOutput:
    """What a site computed; only ``y_NO`` is differentiable.

    Attributes:
        y_NO: Outputs.
        routing: How they were routed.
        counts_LE: Choices of each expert, by the rows of all ranks; None if no losses were asked
            for.
    """

    y_NO: Tensor
    routing: Routing
    counts_LE: Tensor | None


def hilomoe(
    x_ND: Tensor,
    query_NQ: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down_HD: Tensor,
    up_HO: Tensor,
    keys_MQ: Tensor | None,
    config: HiLoMoEConfig,
    plan: Plan,
    loss_weights: tuple[float, float] | None,
) -> SiteOutput:
    """Compute a site.

    Args:
        x_ND: Input.
        query_NQ: The layers' first query; None if it is the input.
        weight: The base map's.
        bias: The base map's, if it has one.
        down_HD: The experts' down-vectors.
        up_HO: Their up-vectors.
        keys_MQ: Their keys; None if those are the down-vectors.
        config: The site's options.
        plan: How to compute it.
        loss_weights: Of the balance and the z loss, whose gradient joins in backward; None computes
            no losses.
    """
    tensors = (x_ND, query_NQ, weight, bias, down_HD, up_HO, keys_MQ)
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        tensors = tuple(None if t is None else t.to(low) for t in tensors)
    with torch.autocast(device, enabled=False):
        y_NO, counts_LE, *routed = _HiLoMoE.apply(*tensors, config, plan, loss_weights)
    return SiteOutput(y_NO=y_NO, routing=_routing(routed), counts_LE=counts_LE)


class _HiLoMoE(torch.autograd.Function):
    """See `hilomoe`."""

    @staticmethod
    def forward(ctx, x, query, weight, bias, down, up, keys, config, plan, loss_weights):
        run = _compiled()[0] if plan.compiled else _forward
        y_NO, counts_LE, gram_MM, *tensors = run(
            x, query, weight, bias, down, up, keys, config, plan
        )
        routed = tensors[:4]
        if loss_weights is None:
            counts_LE = None
        else:
            counts_LE = sum_over_ranks(counts_LE)
            ctx.mark_non_differentiable(counts_LE)
        ctx.mark_non_differentiable(*routed)
        ctx.save_for_backward(x, query, weight, down, up, keys, counts_LE, gram_MM, *tensors)
        ctx.config, ctx.plan, ctx.loss_weights = config, plan, loss_weights
        return y_NO, counts_LE, *routed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO, *_):
        run = _compiled()[1] if ctx.plan.compiled else _backward
        needs = ctx.needs_input_grad[:4]
        grads = run(grad_NO, ctx.saved_tensors, ctx.config, ctx.plan, ctx.loss_weights, needs)
        return *grads, None, None, None


@cache
def _compiled() -> tuple[Callable, Callable]:
    return torch.compile(_forward, fullgraph=True), torch.compile(_backward, fullgraph=True)


def _forward(
    x: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    keys: Tensor | None,
    config: HiLoMoEConfig,
    plan: Plan,
) -> tuple[Tensor, ...]:
    """The output, this rank's counts, and what `_backward` needs.

    Keys are scaled before they meet a query, so that logits come scaled out of the product.
    """
    q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    y_NO = F.linear(x, weight, bias)
    gram_MM = wide(scaled_MQ) @ wide(keys_MQ).t()
    routing = route(wide(scaled_MQ @ q_NQ.t()), gram_MM, config)
    counts_LE = choice_counts(routing.chosen_LkN, config.num_experts).to(gram_MM.dtype)

    way = WAYS[plan.experts]
    chosen, gates = (
        way.indices(_slots(routing, config)),
        way.layout(_slot_gates(routing, config, x)),
    )
    experts = way(chosen)
    hidden = experts.dot(x, down)
    experts.add(y_NO, hidden * gates, _scaled(up, config.alpha))
    return y_NO, counts_LE, gram_MM, *vars(routing).values(), chosen, gates, hidden


def _backward(
    grad_NO: Tensor,
    saved: Sequence[Tensor],
    config: HiLoMoEConfig,
    plan: Plan,
    loss_weights: tuple[float, float] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients by the seven tensors of `_forward`.

    Args:
        grad_NO: By the output.
        saved: What ``_HiLoMoE.forward`` saved.
        config: The site's options.
        plan: How it computes.
        loss_weights: As for `hilomoe`.
        needs: Whether input, query, weight and bias need a gradient.
    """
    x, query, weight, down, up, keys, counts_LE, gram_MM, *routed, chosen, gates, hidden = saved
    routing = _routing(routed)
    need_x, need_query, need_weight, need_bias = needs
    q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
    scale = q_NQ.shape[1] ** -0.5
    scaled_MQ = keys_MQ * scale

    # Experts: each weighs its up-vector with gate * hidden.
    experts = WAYS[plan.experts](chosen)
    grad_w = experts.dot(grad_NO, _scaled(up, config.alpha))
    grad_up = _scaled(experts.grad(grad_NO, hidden * gates, len(up)), config.alpha)
    grad_hidden = grad_w * gates
    grad_down = experts.grad(x, grad_hidden, len(down))

    # Routing: from the gates to the direct logits and the keys' Gram matrix, and to the keys.
    L, k, N = routing.gates_LkN.shape
    grad_gates_SN = wide(experts.layout(grad_w * hidden)).reshape(L, k, config.rank, N)
    loss = None
    if loss_weights is not None:
        loss = loss_gradients(counts_LE, N, config.top_k, loss_weights)
    grads = route_backward(grad_gates_SN.sum(dim=2), routing, gram_MM, config, loss)
    grad_direct_MN = grads.direct_MN.to(x.dtype)
    grad_scaled = ((grads.gram_MM + grads.gram_MM.t()) @ wide(keys_MQ)).to(x.dtype)
    grad_keys = grad_scaled.addmm_(grad_direct_MN, q_NQ) * scale

    # The uses of the input: base map, experts, query.
    grad_x = grad_query = None
    if need_x:
        grad_x = experts.add(grad_NO @ weight, grad_hidden, down)
        if query is None and config.stop_gradient != "query":
            grad_x.addmm_(grad_direct_MN.t(), scaled_MQ)
    if need_query:
        grad_query = grad_direct_MN.t() @ scaled_MQ
    return (
        grad_x,
        grad_query,
        grad_NO.t() @ x if need_weight else None,
        grad_NO.sum(dim=0) if need_bias else None,
        grad_down + grad_keys if keys is None else grad_down,
        grad_up,
        None if keys is None else grad_keys,
    )


def _scaled(t: Tensor, alpha: float) -> Tensor:
    return t if alpha == 1 else t * alpha


def _routing(tensors: Sequence[Tensor]) -> Routing:
    gates, chosen, scores, logsumexp = tensors
    return Routing(gates_LkN=gates, chosen_LkN=chosen, scores_LEN=scores, logsumexp_LN=logsumexp)


def _slots(routing: Routing, config: HiLoMoEConfig) -> Tensor:
    """Where the chosen experts' vectors lie among those of all layers; ``(S, N)``."""
    (L, k, N), E, R = routing.chosen_LkN.shape, config.num_experts, config.rank
    first_L11 = torch.arange(0, L * E, E, device=routing.chosen_LkN.device).view(L, 1, 1)
    expert_SN = (routing.chosen_LkN + first_L11).view(L * k, N)
    if R == 1:
        return expert_SN
    rank_R1 = torch.arange(R, device=expert_SN.device).unsqueeze(1)
    return (expert_SN.unsqueeze(1) * R + rank_R1).view(L * k * R, N)


def _slot_gates(routing: Routing, config: HiLoMoEConfig, like: Tensor) -> Tensor:
    """The gate of each used vector; ``(S, N)``."""
    gates_SN = routing.gates_LkN.to(like.dtype).flatten(0, 1)
    return gates_SN.repeat_interleave(config.rank, dim=0) if config.rank > 1 else gates_SN
