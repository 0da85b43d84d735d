"""What a row computes with its gates: the base map plus the experts that it chose.

The functions here know nothing of autograd: `function` calls each forward with its backward.

Shape legend:
    N  rows     O  output width     L  expert layers     E  experts     R  rank
    k  experts chosen     S  vectors that a row uses, L k R
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.experts import WAYS
from torchrec_hilomoe.hilomoe.plan import Plan
from torchrec_hilomoe.hilomoe.routing import wide

__all__ = ["MixGradients", "Mixed", "mix", "mix_backward"]


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What `mix` found, in the layout of its way; the output is not kept for the backward."""

    y_NO: Tensor | None
    chosen: Tensor
    gates: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class MixGradients:
    """By the arguments of `mix`."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    down: Tensor
    up: Tensor
    gates_LkN: Tensor


def mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates_LkN: Tensor,
    chosen_LkN: Tensor,
    config: HiLoMoEConfig,
    plan: Plan,
) -> Mixed:
    """Add to the base map what the gated experts say."""
    way, y_NO = WAYS[plan.experts], F.linear(x, weight, bias)
    gates_SN = gates_LkN.to(x.dtype).flatten(0, 1)
    if config.rank > 1:
        gates_SN = gates_SN.repeat_interleave(config.rank, dim=0)
    chosen, gates = way.indices(_slots(chosen_LkN, config)), way.layout(gates_SN)
    experts = way(chosen)
    hidden = experts.dot(x, down)
    experts.add(y_NO, hidden * gates, _scaled(up, config.alpha))
    return Mixed(y_NO=y_NO, chosen=chosen, gates=gates, hidden=hidden)


def mix_backward(
    grad_NO: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mixed: Mixed,
    config: HiLoMoEConfig,
    plan: Plan,
    needs: Sequence[bool],
) -> MixGradients:
    """Each expert weighs its up-vector with gate * hidden.

    ``needs`` says whether input, weight and bias need a gradient.
    """
    need_x, need_weight, need_bias = needs
    grad_NO = grad_NO.contiguous()  # a host's sum() hands out one number, expanded
    experts = WAYS[plan.experts](mixed.chosen)
    grad_w = experts.dot(grad_NO, _scaled(up, config.alpha))
    grad_hidden = grad_w * mixed.gates
    grad_gates_SN = wide(experts.layout(grad_w * mixed.hidden))
    k, R, N = config.top_k, config.rank, len(x)
    L = len(grad_gates_SN) // (k * R)
    return MixGradients(
        x=experts.add(grad_NO @ weight, grad_hidden, down) if need_x else None,
        weight=grad_NO.t() @ x if need_weight else None,
        bias=grad_NO.sum(dim=0) if need_bias else None,
        down=experts.grad(x, grad_hidden, len(down)),
        up=_scaled(experts.grad(grad_NO, mixed.hidden * mixed.gates, len(up)), config.alpha),
        gates_LkN=grad_gates_SN.reshape(L, k, R, N).sum(dim=2),
    )


def _scaled(t: Tensor, alpha: float) -> Tensor:
    return t if alpha == 1 else t * alpha


def _slots(chosen_LkN: Tensor, config: HiLoMoEConfig) -> Tensor:
    """Where the chosen experts' vectors lie among those of all layers; ``(S, N)``."""
    (L, k, N), E, R = chosen_LkN.shape, config.num_experts, config.rank
    first_L11 = torch.arange(0, L * E, E, device=chosen_LkN.device).view(L, 1, 1)
    expert_SN = (chosen_LkN + first_L11).view(L * k, N)
    if R == 1:
        return expert_SN
    rank_R1 = torch.arange(R, device=expert_SN.device).unsqueeze(1)
    return (expert_SN.unsqueeze(1) * R + rank_R1).view(L * k * R, N)
