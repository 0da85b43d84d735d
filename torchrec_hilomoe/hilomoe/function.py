"""A site's forward and backward as autograd functions, written by hand.

Autograd would keep every intermediate of the routing and build one ``(N, D)`` gradient for each of
the input's uses. Here the forward keeps the scores and the chosen hidden values, the backward
recomputes the rest, and all parts of the input's gradient are added up in one buffer.

Two halves make a site: `score_by` finds each row's gates, `mix` computes its output with them. Most
sites run both in one function; sites that share a router run them apart, the first once a sample.

The functions run the kernels of `operators`, as `dispatch` calls them.

Shape legend:
    N  rows     D  input width     O  output width    Q  query width     B  samples
    L  expert layers     E  experts     R  rank     k  experts chosen
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe import operators
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.dispatch import (
    apply_function,
    apply_under_autocast,
    call_backward,
    call_kernel,
    differentiable_once,
    in_a_transform,
    without_autocast,
)
from torchrec_hilomoe.hilomoe.execution import Execution
from torchrec_hilomoe.hilomoe.losses import LossWeights, RoutingRecord, wide
from torchrec_hilomoe.hilomoe.ranks import RankGroup, size_of, sum_over_ranks
from torchrec_hilomoe.hilomoe.routing import Routing

__all__ = ["SiteOutput", "hilomoe", "mix_rows", "record_of", "rms_norm", "route_samples"]

# Dynamo of torch 2.11 takes an autograd function some of whose outputs have no gradient for one
# that has none at all: a host's `torch.compile` would train nothing, and say nothing. There it
# breaks the graph here instead, or is refused with `fullgraph=True`. Goes with torch 2.11.
_DYNAMO_KEEPS_GRADIENTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
_Called = ParamSpec("_Called")
_Found = TypeVar("_Found")


def _not_in_a_graph_of_2_11(fn: Callable[_Called, _Found]) -> Callable[_Called, _Found]:
    if _DYNAMO_KEEPS_GRADIENTS:
        return fn
    why = "Dynamo of torch 2.11 loses the gradients of a HiLoMoE site; use torch 2.12 or newer"
    return cast(Callable[_Called, _Found], torch.compiler.disable(fn, reason=why))


@dataclass(frozen=True, kw_only=True)
class SiteOutput:
    """What a site computed; only ``y`` is differentiable.

    Attributes:
        y: Outputs, ``(..., O)``.
        routing: How their rows were routed.
        counts_LE: Choices of each expert, by the rows of all ranks; None if no losses were asked
            for.
    """

    y: Tensor
    routing: Routing
    counts_LE: Tensor | None


@_not_in_a_graph_of_2_11
def hilomoe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_LERD: Tensor,
    up_LERO: Tensor,
    keys_LEQ: Tensor | None,
    query_proj: Tensor | None,
    config: HiLoMoEConfig,
    execution: Execution,
    loss_weights: LossWeights | None,
    group: RankGroup | None = None,
) -> SiteOutput:
    """Compute a site that routes its own rows.

    Args:
        x: Input, ``(..., D)``.
        weight: The base map's.
        bias: The base map's, if it has one.
        down_LERD: The experts' down-vectors.
        up_LERO: Their up-vectors.
        keys_LEQ: Their keys; None if those are the down-vectors.
        query_proj: ``(Q, D)``; None if the query is the input.
        config: The site's options.
        execution: How to compute it.
        loss_weights: Of the balance and the z loss, whose gradient joins in backward; None computes
            no losses.
        group: Over which ranks they are; None are all.
    """
    x_ND, query_NQ = _rows(x, weight), None
    if config.query_dim is not None or config.query_norm:
        query_NQ = x_ND.detach() if config.stop_gradient == "query" else x_ND
        if query_proj is not None:
            query_NQ = F.linear(query_NQ, query_proj)
        if config.query_norm:
            query_NQ = rms_norm(query_NQ)
    tensors = (x_ND, query_NQ, weight, bias, down_LERD, up_LERO, keys_LEQ)
    y_NO, counts_LE, _, *routed = apply_under_autocast(
        _Site, tensors, config, execution, loss_weights, group
    )
    return SiteOutput(
        y=_unflattened(y_NO, x),
        routing=operators.routing_of(routed[:4]),
        counts_LE=None if loss_weights is None else counts_LE,
    )


@_not_in_a_graph_of_2_11
def route_samples(
    query_BQ: Tensor,
    keys_LEQ: Tensor,
    config: HiLoMoEConfig,
    execution: Execution,
    loss_weights: LossWeights | None,
    group: RankGroup | None = None,
) -> tuple[Routing, Tensor | None]:
    """Compute the first half alone: the routing, with differentiable gates, and the counts."""
    with without_autocast(query_BQ.device.type):
        gates_LkB, counts_LE, _, *others = apply_function(
            _Route, wide(query_BQ), wide(keys_LEQ), config, execution, loss_weights, group
        )
    return operators.routing_of((gates_LkB, *others)), None if loss_weights is None else counts_LE


@_not_in_a_graph_of_2_11
def mix_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_LERD: Tensor,
    up_LERO: Tensor,
    routing: Routing,
    offsets: Tensor | None,
    config: HiLoMoEConfig,
    execution: Execution,
) -> Tensor:
    """Compute the second half alone: outputs under the gates that each row's sample was given.

    Args:
        x: ``(B, ..., D)``; or, with offsets, ``(N, D)``: the tokens of all samples in one list.
        weight: The base map's.
        bias: The base map's, if it has one.
        down_LERD: The down-vectors of the layers that compute.
        up_LERO: Their up-vectors.
        routing: Of the samples.
        offsets: ``(B + 1,)``, where in that list each sample's tokens begin.
        config: The site's options.
        execution: How to compute it.

    Raises:
        ValueError: If ``x`` has neither the router's number of samples nor, as far as is known,
            their tokens.
    """
    x_ND = _rows(x, weight)
    layers = len(down_LERD)
    gates, chosen = routing.gates_LkN[:layers], routing.chosen_LkN[:layers]
    samples = gates.shape[2]
    if offsets is not None:
        sample_B = torch.arange(samples, device=x.device)
        lengths_B = offsets[1:] - offsets[:-1]
        sample_N = torch.repeat_interleave(sample_B, lengths_B, output_size=x.shape[0])
        gates, chosen = gates.index_select(2, sample_N), chosen.index_select(2, sample_N)
    elif x.dim() < 2 or x.shape[0] != samples:
        raise ValueError(
            f"SampleRouter: {samples} samples were routed, but a site's input has shape "
            f"{tuple(x.shape)}; its first dimension must be the samples. Give the site rows per "
            "sample, say whose its tokens are (tokens of inject_shared_router), or let it route "
            "its own rows."
        )
    elif (tokens := math.prod(x.shape[1:-1])) != 1:  # numel() would be a constant of an export
        gates, chosen = (t.repeat_interleave(tokens, dim=2) for t in (gates, chosen))
    tensors = (x_ND, weight, bias, down_LERD, up_LERO)
    y_NO, *_ = apply_under_autocast(_Mix, tensors, gates, chosen, config, execution)
    return _unflattened(y_NO, x)


def record_of(
    counts_LE: Tensor | None, routing: Routing, config: HiLoMoEConfig, group: RankGroup | None
) -> RoutingRecord | None:
    """What a site or router keeps of a training pass; None of one that computes no losses."""
    # No value to keep are a proxy of FX, and a tensor inside of one of functorch's transforms.
    if not isinstance(counts_LE, Tensor) or in_a_transform():
        return None
    return RoutingRecord(
        counts_LE=counts_LE,
        scores_LEN=routing.scores_LEN,
        logsumexp_LN=routing.logsumexp_LN,
        top_k=config.top_k,
        ranks=size_of(group),
    )


def rms_norm(query_NQ: Tensor) -> Tensor:
    """Divide each query by its root mean square."""
    return F.rms_norm(query_NQ, query_NQ.shape[1:])


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of ``x``, if a site with this weight can take them."""
    D = weight.shape[1]
    if x.shape[-1] != D:
        raise ValueError(
            f"HiLoMoELinear.in_features is {D}, but the input's last dimension is "
            f"{x.shape[-1]}. Build the site with in_features={x.shape[-1]}."
        )
    if not x.is_floating_point():
        raise ValueError(
            f"HiLoMoELinear takes a floating-point input, got {x.dtype}. "
            "Embed or convert it first, for example with x.float()."
        )
    return x if x.dim() == 2 else x.reshape(-1, D)


def _unflattened(y_NO: Tensor, x: Tensor) -> Tensor:
    """Give rows back the leading dimensions of the input."""
    return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], y_NO.shape[1])


class _Site(torch.autograd.Function):
    """See `hilomoe`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *tensors, config, execution, loss_weights, group = args
        y_NO, counts_LE, *others = call_kernel(operators.site, config, execution, *tensors)
        return y_NO, _shared(counts_LE, loss_weights, group), *others

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, query, weight, _, down, up, keys, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, query, weight, down, up, keys, *output[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_NO, *_):
        config, execution, loss_weights, _ = ctx.options
        needs = ctx.needs_input_grad[:7]
        saved = ctx.saved_tensors
        grads = call_backward(
            operators.site_backward, config, execution, grad_NO, saved, loss_weights, needs[:4]
        )
        return *_wanted(grads, needs), None, None, None, None


class _Route(torch.autograd.Function):
    """See `route_samples`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        query, keys, config, execution, loss_weights, group = args
        counts_LE, memory, gates, *others = call_kernel(
            operators.route, config, execution, query, keys
        )
        return gates, _shared(counts_LE, loss_weights, group), memory, *others

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, keys, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(query, keys, *output[1:3], output[0], *output[3:])

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_gates, *_):
        config, execution, loss_weights, _ = ctx.options
        saved = ctx.saved_tensors
        grads = call_backward(
            operators.route_backward, config, execution, grad_gates, saved, loss_weights
        )
        return *_wanted(grads, ctx.needs_input_grad[:2]), None, None, None, None


class _Mix(torch.autograd.Function):
    """See `mix_rows`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *tensors, config, execution = args
        return tuple(call_kernel(operators.mixed, config, execution, *tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, down, up, gates, _, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, down, up, gates, *output[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_NO, *_):
        needs = ctx.needs_input_grad[:6]
        saved = ctx.saved_tensors
        grads = call_backward(operators.mixed_backward, *ctx.options, grad_NO, saved, needs[:3])
        return *_wanted(grads, needs), None, None, None


def _shared(counts_LE: Tensor, loss_weights: LossWeights | None, group: RankGroup | None) -> Tensor:
    """Of all ranks where losses are computed, else of this one."""
    return counts_LE if loss_weights is None else sum_over_ranks(counts_LE, group)


def _wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
