"""A site's forward and backward as autograd functions, written by hand.

Autograd would keep every intermediate of the routing and build one ``(N, D)`` gradient for each of
the input's uses. Here the forward keeps the scores and the chosen hidden values, the backward
recomputes the rest, and all parts of the input's gradient are added up in one buffer.

Two halves make a site: `score_by` finds each row's gates, `mix` computes its output with them. Most
sites run both in one function; sites that share a router run them apart, the first once a sample.

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

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.losses import sum_over_ranks
from torchrec_hilomoe.hilomoe.mixing import mix, mix_backward, Mixed
from torchrec_hilomoe.hilomoe.plan import Plan
from torchrec_hilomoe.hilomoe.query_space import score_by, score_by_backward
from torchrec_hilomoe.hilomoe.routing import Routing, Scored, wide

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


def route_samples(
    query_BQ: Tensor,
    keys_MQ: Tensor,
    config: HiLoMoEConfig,
    plan: Plan,
    loss_weights: tuple[float, float] | None,
) -> tuple[Routing, Tensor | None]:
    """Compute the first half alone: the routing, with differentiable gates, and the counts."""
    with torch.autocast(query_BQ.device.type, enabled=False):
        counts_LE, *routed = _Route.apply(wide(query_BQ), wide(keys_MQ), config, plan, loss_weights)
    return _routing(routed), counts_LE


def mix_rows(
    x_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_HD: Tensor,
    up_HO: Tensor,
    gates_LkN: Tensor,
    chosen_LkN: Tensor,
    config: HiLoMoEConfig,
    plan: Plan,
) -> Tensor:
    """Compute the second half alone: outputs under given gates."""
    tensors, device = (x_ND, weight, bias, down_HD, up_HO), x_ND.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        tensors = tuple(None if t is None else t.to(low) for t in tensors)
    with torch.autocast(device, enabled=False):
        return _Mix.apply(*tensors, gates_LkN, chosen_LkN, config, plan)


class _HiLoMoE(torch.autograd.Function):
    """See `hilomoe`."""

    @staticmethod
    def forward(ctx, x, query, weight, bias, down, up, keys, config, plan, loss_weights):
        run = _forward if plan.backend == "eager" else _runs(plan.backend)[0]
        y_NO, counts_LE, memory, *tensors = run(
            x, query, weight, bias, down, up, keys, config, plan
        )
        routed = tensors[:4]
        counts_LE = _shared_counts(counts_LE, loss_weights)
        ctx.mark_non_differentiable(*routed, *([] if counts_LE is None else [counts_LE]))
        ctx.save_for_backward(x, query, weight, down, up, keys, counts_LE, memory, *tensors)
        ctx.config, ctx.plan, ctx.loss_weights = config, plan, loss_weights
        return y_NO, counts_LE, *routed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO, *_):
        backend = ctx.plan.backend  # Dynamo, which traces the eager one, cannot see into a cache
        run = _backward if backend == "eager" else _runs(backend)[1]
        needs = ctx.needs_input_grad[:4]
        grads = run(grad_NO, ctx.saved_tensors, ctx.config, ctx.plan, ctx.loss_weights, needs)
        return *grads, None, None, None


class _Route(torch.autograd.Function):
    """See `route_samples`."""

    @staticmethod
    def forward(ctx, query, keys, config, plan, loss_weights):
        scored = score_by(plan.space, query, keys, config)
        assert scored.counts_LE is not None
        routed = tuple(vars(scored.routing).values())
        counts_LE = _shared_counts(scored.counts_LE, loss_weights)
        ctx.mark_non_differentiable(*routed[1:], *([] if counts_LE is None else [counts_LE]))
        ctx.save_for_backward(query, keys, counts_LE, scored.memory, *routed)
        ctx.config, ctx.plan, ctx.loss_weights = config, plan, loss_weights
        return counts_LE, *routed

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_gates, *__):
        query, keys, counts_LE, memory, *routed = ctx.saved_tensors
        scored = Scored(routing=_routing(routed), memory=memory, counts_LE=counts_LE)
        grads = score_by_backward(
            ctx.plan.space, grad_gates, query, keys, scored, ctx.config, ctx.loss_weights
        )
        grad_query = grads.add_query_to(torch.zeros_like(query))
        return grad_query, grads.keys_MQ, None, None, None


class _Mix(torch.autograd.Function):
    """See `mix_rows`."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, gates, chosen, config, plan):
        mixed = mix(x, weight, bias, down, up, gates, chosen, config, plan)
        ctx.save_for_backward(x, weight, down, up, mixed.chosen, mixed.gates, mixed.hidden)
        ctx.config, ctx.plan = config, plan
        return mixed.y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        x, weight, down, up, chosen, gates, hidden = ctx.saved_tensors
        mixed = Mixed(y_NO=None, chosen=chosen, gates=gates, hidden=hidden)
        grads = mix_backward(
            grad_NO, x, weight, down, up, mixed, ctx.config, ctx.plan, ctx.needs_input_grad[:3]
        )
        gates_LkN = grads.gates_LkN
        return grads.x, grads.weight, grads.bias, grads.down, grads.up, gates_LkN, None, None, None


@cache
def _runs(backend: str) -> tuple[Callable, Callable]:
    """What computes forward and backward where not these functions here do."""
    if backend == "triton":
        from torchrec_hilomoe.hilomoe import fused  # triton is there only if it was asked for

        return fused.forward, fused.backward
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
    """The output, this rank's counts, and what `_backward` needs."""
    q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
    scored = score_by(plan.space, q_NQ, keys_MQ, config)
    gates_LkN, chosen_LkN = scored.routing.gates_LkN, scored.routing.chosen_LkN
    mixed = mix(x, weight, bias, down, up, gates_LkN, chosen_LkN, config, plan)
    routed = vars(scored.routing).values()
    found = (mixed.chosen, mixed.gates, mixed.hidden)
    assert mixed.y_NO is not None
    assert scored.counts_LE is not None
    return mixed.y_NO, scored.counts_LE, scored.memory, *routed, *found


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
    x, query, weight, down, up, keys, counts_LE, memory, *routed, chosen, gates, hidden = saved
    need_x, need_query, need_weight, need_bias = needs
    mixed = Mixed(y_NO=None, chosen=chosen, gates=gates, hidden=hidden)
    by_mixing = mix_backward(
        grad_NO, x, weight, down, up, mixed, config, plan, (need_x, need_weight, need_bias)
    )
    scored = Scored(routing=_routing(routed), memory=memory, counts_LE=counts_LE)
    q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
    by_scoring = score_by_backward(
        plan.space, by_mixing.gates_LkN, q_NQ, keys_MQ, scored, config, loss_weights
    )
    if by_mixing.x is not None and query is None and config.stop_gradient != "query":
        by_scoring.add_query_to(by_mixing.x)
    return (
        by_mixing.x,
        by_scoring.add_query_to(torch.zeros_like(q_NQ)) if need_query else None,
        by_mixing.weight,
        by_mixing.bias,
        by_mixing.down + by_scoring.keys_MQ if keys is None else by_mixing.down,
        by_mixing.up,
        None if keys is None else by_scoring.keys_MQ,
    )


def _shared_counts(counts_LE: Tensor, loss_weights: tuple[float, float] | None) -> Tensor | None:
    """Of all ranks where losses are computed, else none."""
    return None if loss_weights is None else sum_over_ranks(counts_LE)


def _routing(tensors: Sequence[Tensor]) -> Routing:
    gates, chosen, scores, logsumexp = tensors
    return Routing(gates_LkN=gates, chosen_LkN=chosen, scores_LEN=scores, logsumexp_LN=logsumexp)
