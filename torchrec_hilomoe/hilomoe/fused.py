"""A site's forward and backward by Triton kernels, in the place of `function`'s own.

The kernels do what passes over the rows; sums over rows, which are the parameters' gradients, are
plain products. Unlike the other backends this one does not leave the base map to PyTorch, so with
experts that add nothing the outputs are those of ``nn.Linear`` to rounding, not to the bit.

Shape legend: as in `function`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from torchrec_hilomoe.hilomoe import triton_kernels
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.losses import choice_counts, loss_gradients
from torchrec_hilomoe.hilomoe.plan import Plan
from torchrec_hilomoe.hilomoe.routing import wide

__all__ = ["backward", "forward"]

ROWS, WIDTH = 64, 64  # of a tile
LEAST = 16  # a side of a product that tensor cores take

# Triton's annotations are for the compiler of kernels, not for those who call them.
forward_kernel: Any = triton_kernels.forward_kernel
backward_kernel: Any = triton_kernels.backward_kernel


def forward(
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
    """As the forward in `function`, but keeping all hidden values, and weights for choices."""
    x, q_NQ = _checked(x), _checked(x if query is None else query)
    keys_MQ = down if keys is None else keys
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    gram_MM = wide(scaled_MQ) @ wide(keys_MQ).t()
    (N, D), (M, Q), out, H = x.shape, keys_MQ.shape, len(weight), len(down)
    E, k = config.num_experts, config.top_k
    L, selected = M // E, config.query_update == "selected"
    scores_LEN, logsumexp_LN = gram_MM.new_empty(L, E, N), gram_MM.new_empty(L, N)
    gates_LkN = gram_MM.new_empty(L, k, N)
    chosen_LkN = torch.empty(L, k, N, dtype=torch.int64, device=x.device)
    hidden_NH, weighted_NH = x.new_empty(N, H), x.new_empty(N, H)
    y_NO = x.new_empty(N, out)
    if N:
        forward_kernel[(triton.cdiv(N, ROWS),)](
            x, q_NQ, weight.contiguous(), bias, down.contiguous(), _scaled(up, config.alpha),
            scaled_MQ, gram_MM,
            y_NO, gram_MM.new_empty(N, M), hidden_NH, weighted_NH, scores_LEN,
            torch.empty_like(scores_LEN) if selected else scores_LEN, logsumexp_LN, gates_LkN,
            chosen_LkN, N, D, out, Q,
            **_sizes(config, L), HAS_BIAS=bias is not None, SELECTED=selected,
        )  # fmt: skip
    counts_LE = choice_counts(chosen_LkN, E).to(gram_MM.dtype)
    routed = (gates_LkN, chosen_LkN, scores_LEN, logsumexp_LN)
    return y_NO, counts_LE, gram_MM, *routed, chosen_LkN, weighted_NH, hidden_NH


def backward(
    grad_NO: Tensor,
    saved: Sequence[Tensor],
    config: HiLoMoEConfig,
    plan: Plan,
    loss_weights: tuple[float, float] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As the backward in `function`."""
    (x, query, weight, down, up, keys, counts_LE, gram_MM, _, chosen_LkN, scores_LEN, logsumexp_LN,
     _, weighted_NH, hidden_NH) = saved  # fmt: skip
    need_x, need_query, need_weight, need_bias = needs
    x, grad_NO = x.contiguous(), grad_NO.contiguous()
    q_NQ, keys_MQ = x if query is None else query, down if keys is None else keys
    (N, D), (M, Q), out = x.shape, keys_MQ.shape, len(weight)
    L, E = scores_LEN.shape[:2]
    loss = None
    if loss_weights is not None:
        assert counts_LE is not None
        loss = loss_gradients(counts_LE, N, config.top_k, loss_weights)
    scaled_MQ = keys_MQ * Q**-0.5
    grad_hidden_NH, direct_NM = torch.empty_like(hidden_NH), gram_MM.new_empty(N, M)
    grad_x = torch.empty_like(x) if need_x else None
    if N:
        backward_kernel[(triton.cdiv(N, ROWS),)](
            grad_NO, weight.contiguous(), down.contiguous(), _scaled(up, config.alpha), scaled_MQ,
            gram_MM, hidden_NH, scores_LEN, logsumexp_LN, chosen_LkN,
            None if loss is None else loss.scores_LE.contiguous(),
            None if loss is None else torch.as_tensor(loss.z, device=x.device).reshape(1),
            gram_MM.new_empty(N, len(down)), grad_hidden_NH, direct_NM, grad_x, N, D, out,
            **_sizes(config, L), HAS_LOSS=loss is not None,
            SELECTED=config.query_update == "selected",
            STOP_SCORES=config.stop_gradient == "scores", NEEDS_X=need_x,
            THROUGH_QUERY=query is None and config.stop_gradient != "query",
        )  # fmt: skip
    direct = direct_NM.to(q_NQ.dtype)
    by_keys_MQ = _by_keys(direct_NM, scores_LEN, chosen_LkN, keys_MQ, config)
    by_keys_MQ = by_keys_MQ.to(q_NQ.dtype).addmm_(direct.t(), q_NQ) * Q**-0.5
    by_down = grad_hidden_NH.t() @ x
    return (
        grad_x,
        direct @ scaled_MQ if need_query else None,
        grad_NO.t() @ x if need_weight else None,
        grad_NO.sum(dim=0) if need_bias else None,
        by_down + by_keys_MQ if keys is None else by_down,
        _scaled(weighted_NH.t() @ grad_NO, config.alpha),
        None if keys is None else by_keys_MQ,
    )


def _by_keys(
    direct_NM: Tensor,
    scores_LEN: Tensor,
    chosen_LkN: Tensor,
    keys_MQ: Tensor,
    config: HiLoMoEConfig,
) -> Tensor:
    """The part of the keys' gradient that comes through their Gram matrix; not yet scaled."""
    passed_LEN = scores_LEN
    if config.query_update == "selected":
        is_chosen_LEN = torch.zeros_like(scores_LEN).scatter_(1, chosen_LkN, 1.0)
        passed_LEN = scores_LEN * is_chosen_LEN
    gram_MM = direct_NM.t() @ passed_LEN.flatten(0, 1).t()
    layer_M = torch.arange(len(gram_MM), device=gram_MM.device) // config.num_experts
    gram_MM = gram_MM * (layer_M.unsqueeze(1) > layer_M)  # a layer hears those before it
    return (gram_MM + gram_MM.t()) @ wide(keys_MQ)


def _checked(t: Tensor) -> Tensor:
    if t.dtype == torch.float64:
        raise ValueError(
            "HiLoMoEConfig.backend = 'triton' computes in float32 and below, got float64. "
            "Use backend='eager'."
        )
    return t.contiguous()


def _scaled(t: Tensor, alpha: float) -> Tensor:
    return t.contiguous() if alpha == 1 else t * alpha


def _sizes(config: HiLoMoEConfig, layers: int) -> dict[str, int]:
    experts = layers * config.num_experts

    def padded(size: int) -> int:
        return max(LEAST, 1 << (size - 1).bit_length())

    return {
        "L": layers,
        "E": config.num_experts,
        "R": config.rank,
        "K": config.top_k,
        "EP": padded(config.num_experts),
        "MP": padded(experts),
        "HP": padded(experts * config.rank),
        "BN": ROWS,
        "BD": WIDTH,
        "BO": WIDTH,
    }
