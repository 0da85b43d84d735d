"""A site's forward and backward as one autograd function, written by hand.

Autograd would keep every intermediate of the routing and build one ``(N, D)`` gradient for each of
the input's uses. Here the forward keeps the scores and the chosen hidden values, the backward
recomputes the rest, and all parts of the input's gradient are added up in one buffer.

Shape legend:
    N  rows     D  input width     O  output width    Q  query width
    L  expert layers     E  experts     R  rank     k  experts chosen
    M  experts of all layers, L E       H  their vectors, L E R      S  those a row uses, L k R
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.experts import Gathered, gathering_pays, spread
from torchrec_hilomoe.hilomoe.losses import choice_counts, loss_gradients, sum_over_ranks
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
        loss_weights: Of the balance and the z loss, whose gradient joins in backward; None computes
            no losses.
    """
    tensors = (x_ND, query_NQ, weight, bias, down_HD, up_HO, keys_MQ)
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        tensors = tuple(None if t is None else t.to(low) for t in tensors)
    with torch.autocast(device, enabled=False):
        y_NO, counts_LE, *routed = _HiLoMoE.apply(*tensors, config, loss_weights)
    return SiteOutput(y_NO=y_NO, routing=_routing(routed), counts_LE=counts_LE)


class _HiLoMoE(torch.autograd.Function):
    """See `hilomoe`; the maths is that of `routing` and `experts`.

    Keys are scaled before they meet a query, so that logits come scaled out of the product; their
    gradients are by the scaled keys until the end.
    """

    @staticmethod
    def forward(ctx, x, query, weight, bias, down, up, keys, config, loss_weights):
        gathered, merged = _plan(query, keys, config, x.shape[1])
        q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
        scale = q_NQ.shape[1] ** -0.5
        scaled_MQ = keys_MQ * scale
        y_NO = F.linear(x, weight, bias)
        hidden_HN = None
        if merged:
            both_XN = torch.cat([scaled_MQ, down]) @ x.t()
            direct_MN, hidden_HN = both_XN.split([len(keys_MQ), len(down)])
        else:
            direct_MN = scaled_MQ @ q_NQ.t()
            if not gathered:
                hidden_HN = down @ x.t()
        gram_MM = wide(scaled_MQ) @ wide(keys_MQ).t()
        routing = route(wide(direct_MN), gram_MM, config)
        counts_LE = None
        if loss_weights is not None:
            counts_LE = choice_counts(routing.chosen_LkN, config.num_experts)
            counts_LE = sum_over_ranks(counts_LE.to(gram_MM.dtype))

        chosen_SN, gates_SN = _slots(routing, config), _slot_gates(routing, config, x)
        alpha_up = up if config.alpha == 1 else up * config.alpha
        if hidden_HN is None:
            chosen, gates = chosen_SN.t().contiguous(), gates_SN.t().contiguous()
            experts = Gathered(chosen)
            hidden = experts.dot(x, down)
            experts.add(y_NO, hidden * gates, alpha_up)
        else:
            chosen, gates, hidden = chosen_SN, gates_SN, hidden_HN.gather(0, chosen_SN)
            y_NO.addmm_(spread(hidden * gates, chosen, len(up)).t(), alpha_up)
        routed = tuple(vars(routing).values())
        ctx.save_for_backward(
            x, query, weight, down, up, keys, chosen, gates, hidden, gram_MM, counts_LE, *routed
        )
        ctx.config, ctx.loss_weights = config, loss_weights
        ctx.mark_non_differentiable(*routed, *([] if counts_LE is None else [counts_LE]))
        return y_NO, counts_LE, *routed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO, *_):
        saved = ctx.saved_tensors
        x, query, weight, down, up, keys, chosen, gates, hidden, gram_MM, counts_LE = saved[:11]
        routing, config = _routing(saved[11:]), ctx.config
        gathered, merged = _plan(query, keys, config, x.shape[1])
        need_x, need_query, need_weight, need_bias, *_ = ctx.needs_input_grad
        q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
        scale = q_NQ.shape[1] ** -0.5
        scaled_MQ, N, M, H = keys_MQ * scale, len(x), len(keys_MQ), len(down)

        # Up: from the output to w = gate * hidden, and to the up-vectors.
        alpha_up = up if config.alpha == 1 else up * config.alpha
        if gathered:
            experts = Gathered(chosen)
            by_choice = experts.sort(H)
            grad_w = experts.dot(grad_NO, alpha_up)
            grad_up = by_choice.grad(grad_NO, hidden * gates)
            grad_gates_SN = (grad_w * hidden).t()
        else:
            grad_w = (alpha_up @ grad_NO.t()).gather(0, chosen)
            grad_up = spread(hidden * gates, chosen, H) @ grad_NO
            grad_gates_SN = grad_w * hidden
        if config.alpha != 1:
            grad_up *= config.alpha
        grad_hidden = grad_w * gates

        # Routing: from the gates to the direct logits and the keys' Gram matrix.
        L, k, _ = routing.gates_LkN.shape
        grad_gates_LkN = wide(grad_gates_SN).reshape(L, k, config.rank, N).sum(dim=2)
        loss = None
        if ctx.loss_weights is not None:
            loss = loss_gradients(counts_LE, N, config.top_k, ctx.loss_weights)
        both_XN = gram_MM.new_zeros(M + H if merged else M, N)
        grad_gram_MM = route_backward(grad_gates_LkN, routing, gram_MM, config, loss, both_XN[:M])
        grad_gram_MM = grad_gram_MM + grad_gram_MM.t()
        grad_scaled = (grad_gram_MM @ wide(keys_MQ)).to(x.dtype)

        # Down: the uses of the input are the base map, the query and the hidden values.
        grad_x = grad_NO @ weight if need_x else None
        to_query = query is None and config.stop_gradient != "query"
        if merged:
            both_XN[M:].scatter_(0, chosen, wide(grad_hidden))
            both_XN = both_XN.to(x.dtype)
            grad_direct_x, grad_down = (both_XN @ x).split([M, H])
            grad_scaled += grad_direct_x
            if grad_x is not None:
                grad_x.addmm_(both_XN.t(), torch.cat([scaled_MQ, down]))
        else:
            grad_direct_MN = both_XN.to(x.dtype)
            grad_scaled.addmm_(grad_direct_MN, q_NQ)
            if grad_x is not None and to_query:
                grad_x.addmm_(grad_direct_MN.t(), scaled_MQ)
            if gathered:
                grad_down = by_choice.grad(x, grad_hidden)
                if grad_x is not None:
                    experts.add(grad_x, grad_hidden, down)
            else:
                grad_hidden_HN = spread(grad_hidden, chosen, H)
                grad_down = grad_hidden_HN @ x
                if grad_x is not None:
                    grad_x.addmm_(grad_hidden_HN.t(), down)
        grad_query = both_XN.to(x.dtype).t() @ scaled_MQ if need_query else None
        grad_keys = grad_scaled * scale
        return (
            grad_x,
            grad_query,
            grad_NO.t() @ x if need_weight else None,
            grad_NO.sum(dim=0) if need_bias else None,
            grad_down + grad_keys if keys is None else grad_down,
            grad_up,
            None if keys is None else grad_keys,
            None,
            None,
        )


def _plan(
    query: Tensor | None, keys: Tensor | None, config: HiLoMoEConfig, width: int
) -> tuple[bool, bool]:
    """Whether experts are gathered; if not, whether keys and down-vectors share one product."""
    gathered = gathering_pays(config.num_experts, config.top_k, width)
    shared = query is None and keys is not None and config.stop_gradient != "query"
    return gathered, shared and not gathered


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
