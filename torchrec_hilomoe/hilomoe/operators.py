"""What a site runs, as operators of PyTorch: opaque to FX, their FLOPs counted by formulas.

A kernel here is the operator of the same name in ``torch.ops.hilomoe``. `torch.library` defines
them directly, since calls through ``torch.library.custom_op`` make a site of few rows up to three
times as slow (``benchmarks/LOG.md``). A site's options are text to an operator, whose schema has no
dataclasses; ``torch.vmap`` runs it once for each example. Derivatives are `function`'s.

Shape legend: as in `function`, and
    M  experts of all layers, L E
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.execution import Execution
from torchrec_hilomoe.hilomoe.experts import mix, mix_backward
from torchrec_hilomoe.hilomoe.routing import Routing, score_by, score_by_backward, Scored

__all__ = [
    "EXPERT_FLOPS",
    "implementation",
    "mixed",
    "mixed_backward",
    "operator",
    "options_of",
    "route",
    "route_backward",
    "routing_of",
    "site",
    "site_backward",
]

_LIBRARY = torch.library.Library("hilomoe", "DEF")


@cache
def options_of(config: HiLoMoEConfig, execution: Execution) -> str:
    """A site's options as an operator takes them."""
    own = {field.name: getattr(config, field.name) for field in fields(HiLoMoEConfig)}
    return json.dumps([own, asdict(execution)])


@cache
def _read(options: str) -> tuple[HiLoMoEConfig, Execution]:
    config, execution = json.loads(options)
    return HiLoMoEConfig(**config), Execution(**execution)


@cache
def operator(kernel: Callable) -> Callable[..., list[Tensor]]:
    """The operator that runs a kernel here, by the backend of its options."""
    return getattr(torch.ops.hilomoe, kernel.__name__).default


@cache
def implementation(kernel: Callable, config: HiLoMoEConfig, execution: Execution) -> Callable:
    """A kernel with these options, as their backend runs it."""
    if execution.backend == "triton":
        from torchrec_hilomoe.hilomoe import fused  # triton is there only if it was asked for

        kernel = getattr(fused, kernel.__name__)
    elif execution.backend == "compiled":
        kernel = torch.compile(kernel, fullgraph=True)
    return partial(kernel, config, execution)


def _operator(schema: str, flops: Callable[..., int]) -> Callable[[Callable], Callable]:
    """Define a kernel's operator, which takes options where that takes config and execution."""

    def define(kernel: Callable) -> Callable:
        def run(options: str, *args) -> list[Tensor]:
            return implementation(kernel, *_read(options))(*args)

        def shapes(options: str, *args) -> list[Tensor]:
            return kernel(*_read(options), *args)

        def each(info, in_dims, *args) -> tuple[list[Tensor], list[int]]:
            run = operator(kernel)
            if info.batch_size == 0:  # one example of zeros has the shapes of those that are none
                one = run(*_zeros(args, in_dims))
                return [t.new_empty(0, *t.shape) for t in one], [0] * len(one)
            examples = [run(*_example(at, args, in_dims)) for at in range(info.batch_size)]
            stacked = [torch.stack(tensors) for tensors in zip(*examples, strict=True)]
            return stacked, [0] * len(stacked)

        name = f"hilomoe::{kernel.__name__}"
        _LIBRARY.define(f"{kernel.__name__}(str options, {schema}) -> Tensor[]")
        _LIBRARY.impl(kernel.__name__, run, "CompositeExplicitAutograd")
        torch.library.register_fake(name, shapes, lib=_LIBRARY)
        torch.library.register_vmap(name, each, lib=_LIBRARY)
        register_flop_formula(getattr(torch.ops.hilomoe, kernel.__name__))(flops)
        return kernel

    return define


def _example(at: int, args: Sequence, in_dims: Sequence) -> list:
    """The arguments of one of the calls that ``torch.vmap`` makes one of."""
    return [
        arg if dim is None
        else _example(at, arg, dim) if isinstance(arg, list | tuple)
        else arg.select(dim, at)
        for arg, dim in zip(args, in_dims, strict=True)
    ]  # fmt: skip


def _zeros(args: Sequence, in_dims: Sequence) -> list:
    """As `_example`, of zeros: there is none to take."""
    return [
        arg if dim is None
        else _zeros(arg, dim) if isinstance(arg, list | tuple)
        else arg.new_zeros(arg.movedim(dim, 0).shape[1:])
        for arg, dim in zip(args, in_dims, strict=True)
    ]  # fmt: skip


def _expert_flops(options, x, weight, bias, down, *_, **__) -> int:
    """FLOPs of the products with the experts' vectors, on their way down and up."""
    config, execution = _read(options)
    (rows, D), (L, E, R, _) = x, down
    vectors = L * R * (E if execution.experts == "dense" else config.top_k)
    return 2 * rows * vectors * (D + weight[0])


def _mixed_flops(options, x, weight, *others, **_) -> int:
    return 2 * x[0] * weight[0] * weight[1] + _expert_flops(options, x, weight, *others)


def _mixed_backward_flops(options, grad, saved, needs, **_) -> int:
    x, weight, down, *_ = saved
    need_x, need_weight, _ = needs
    experts = 2 * _expert_flops(options, x, weight, None, down)
    spared = 0 if need_x else experts // 2 * x[1] // (x[1] + weight[0])
    return 2 * x[0] * weight[0] * weight[1] * (need_x + need_weight) + experts - spared


def _route_flops(options, query, keys, **_) -> int:
    """FLOPs of the logits: the query's products with the keys, and what layers pass on."""
    return _logit_flops(query, keys) + _passing_flops(options, query, keys, times=1)


def _route_backward_flops(options, grad, saved, loss_weights, need_query=True, **_) -> int:
    query, keys, *_ = saved
    config, execution = _read(options)
    factors = 1 + (need_query or execution.space == "queries")
    times = 1 if config.stop_gradient == "scores" else 2
    return factors * _logit_flops(query, keys) + _passing_flops(options, query, keys, times)


def _logit_flops(query, keys) -> int:
    return 2 * query[0] * keys[0] * keys[1] * query[1]


def _passing_flops(options: str, query, keys, times: int) -> int:
    """Through the keys' Gram matrix or, where the execution says so, by moving the query."""
    config, execution = _read(options)
    (rows, Q), (L, E, *_) = query, keys
    if execution.space == "queries":
        passed = E if config.query_update == "soft" else config.top_k
        return times * 2 * rows * (L - 1) * passed * Q
    return 2 * (L * E) ** 2 * Q + times * rows * L * (L - 1) * E**2


def _site_flops(options, x, query, weight, bias, down, up, keys, **_) -> int:
    routing = _route_flops(options, x if query is None else query, down if keys is None else keys)
    return _mixed_flops(options, x, weight, bias, down) + routing


def _site_backward_flops(options, grad, saved, loss_weights, needs, **_) -> int:
    x, query, weight, down, _, keys, *_ = saved
    need_x, need_query, *need_map = needs
    if query is None:
        need_query = need_x and _read(options)[0].stop_gradient != "query"
    routed = (x if query is None else query, down if keys is None else keys)
    routing = _route_backward_flops(options, grad, routed, loss_weights, need_query)
    return _mixed_backward_flops(options, grad, (x, weight, down), (need_x, *need_map)) + routing


@_operator(
    "Tensor x, Tensor? query, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? keys",
    _site_flops,
)
def site(
    config: HiLoMoEConfig,
    execution: Execution,
    x: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    keys: Tensor | None,
) -> list[Tensor]:
    """The output, and what `route` and `mixed` find for it."""
    routed_by = (x if query is None else query, down if keys is None else keys)
    counts_LE, memory, gates_LkN, chosen_LkN, *routed = route(config, execution, *routed_by)
    y_NO, *found = mixed(config, execution, x, weight, bias, down, up, gates_LkN, chosen_LkN)
    return [y_NO, counts_LE, memory, gates_LkN, chosen_LkN, *routed, *found]


@_operator(
    "Tensor grad, Tensor?[] saved, float[]? loss_weights, bool[] needs", _site_backward_flops
)
def site_backward(
    config: HiLoMoEConfig,
    execution: Execution,
    grad_NO: Tensor,
    saved: Sequence[Tensor],
    loss_weights: Sequence[float] | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients by the seven tensors of `site`; empty where none is needed.

    Args:
        config: The site's options.
        execution: How it computes.
        grad_NO: By the output.
        saved: The tensors of `site` but the bias, and what it returned but the output; counts are
            those of all ranks.
        loss_weights: Of the balance and the z loss; None if neither was computed.
        needs: Whether input, query, weight and bias need a gradient.
    """
    x, query, weight, down, up, keys, *scored, slots, hidden = saved
    need_x, need_query, need_weight, need_bias = needs
    by_mixing = mix_backward(
        grad_NO, x, weight, _vectors(down), _vectors(up), scored[2], slots, hidden, config,
        execution, (need_x, need_weight, need_bias),
    )  # fmt: skip
    keys_MQ = _vectors(down if keys is None else keys)
    q_NQ = x if query is None else query
    by_scoring = score_by_backward(
        execution.space, by_mixing.gates_LkN, q_NQ, keys_MQ, _scored(scored), config, loss_weights
    )
    if need_x and query is None and config.stop_gradient != "query":
        by_scoring.add_query_to(by_mixing.x)
    return [
        by_mixing.x,
        by_scoring.add_query_to(torch.zeros_like(q_NQ)) if need_query else q_NQ.new_empty(0),
        by_mixing.weight,
        by_mixing.bias,
        (by_mixing.down + by_scoring.keys_MQ if keys is None else by_mixing.down).view(down.shape),
        by_mixing.up.view(up.shape),
        q_NQ.new_empty(0) if keys is None else by_scoring.keys_MQ.view(keys.shape),
    ]


@_operator("Tensor query, Tensor keys", _route_flops)
def route(config: HiLoMoEConfig, execution: Execution, query: Tensor, keys: Tensor) -> list[Tensor]:
    """This rank's counts, what the backward needs besides, and the routing."""
    scored = score_by(execution.space, query, _vectors(keys), config)
    found = scored.routing
    routed = (found.gates_LkN, found.chosen_LkN, found.scores_LEN, found.logsumexp_LN)
    assert scored.counts_LE is not None
    return [scored.counts_LE, scored.memory, *routed]


@_operator("Tensor grad, Tensor[] saved, float[]? loss_weights", _route_backward_flops)
def route_backward(
    config: HiLoMoEConfig,
    execution: Execution,
    grad_gates_LkN: Tensor,
    saved: Sequence[Tensor],
    loss_weights: Sequence[float] | None,
) -> list[Tensor]:
    """The gradients by query and keys; ``saved`` are they, and what `route` returned."""
    query, keys, *scored = saved
    grads = score_by_backward(
        execution.space,
        grad_gates_LkN,
        query,
        _vectors(keys),
        _scored(scored),
        config,
        loss_weights,
    )
    return [grads.add_query_to(torch.zeros_like(query)), grads.keys_MQ.view(keys.shape)]


@_operator(
    "Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor gates, Tensor chosen",
    _mixed_flops,
)
def mixed(
    config: HiLoMoEConfig,
    execution: Execution,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates_LkN: Tensor,
    chosen_LkN: Tensor,
) -> list[Tensor]:
    """The output, the chosen vectors' places, and the products with them."""
    found = mix(
        x, weight, bias, _vectors(down), _vectors(up), gates_LkN, chosen_LkN, config, execution
    )
    return [found.y_NO, found.slots, found.hidden]


@_operator("Tensor grad, Tensor[] saved, bool[] needs", _mixed_backward_flops)
def mixed_backward(
    config: HiLoMoEConfig,
    execution: Execution,
    grad_NO: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients by input, weight, bias, down- and up-vectors, and gates."""
    x, weight, down, up, gates_LkN, slots, hidden = saved
    grads = mix_backward(
        grad_NO, x, weight, _vectors(down), _vectors(up), gates_LkN, slots, hidden, config,
        execution, needs,
    )  # fmt: skip
    down_LERD, up_LERO = grads.down.view(down.shape), grads.up.view(up.shape)
    return [grads.x, grads.weight, grads.bias, down_LERD, up_LERO, grads.gates_LkN]


# What the experts alone take of an operator's FLOPs: without the base map and the routing.
EXPERT_FLOPS = {
    torch.ops.hilomoe.site: lambda options, x, query, *others, **_: _expert_flops(
        options, x, *others
    ),
    torch.ops.hilomoe.mixed: _expert_flops,
}


def _vectors(parameter: Tensor) -> Tensor:
    """Those of all experts, one below the other."""
    return parameter.flatten(0, -2)


def routing_of(tensors: Sequence[Tensor]) -> Routing:
    """The routing that `route` returned as tensors."""
    gates, chosen, scores, logsumexp = tensors
    return Routing(gates_LkN=gates, chosen_LkN=chosen, scores_LEN=scores, logsumexp_LN=logsumexp)


def _scored(tensors: Sequence[Tensor]) -> Scored:
    counts_LE, memory, *routed = tensors
    return Scored(routing=routing_of(routed), memory=memory, counts_LE=counts_LE)
