r"""Auxiliary losses over the global batch, attached to a site's output.

A site must not ask its host to add a loss term. So its output passes through an identity whose
backward also sends the gradient of the auxiliary loss into the routing: whatever loss the host
computes from the output, one backward through it trains the routers once.

**Global batch.** With ``f`` the share of all ranks' rows that chose an expert and ``P`` its mean
score over them, balance is ``(E / k) sum_e f_e P_e``. The shares are not differentiable, so counts
are all-reduced (a few numbers, started in forward, waited for in backward); the number of rows of
all ranks comes with them, since every row makes ``k`` choices. ``P`` is differentiable and stays
local: each rank's gradient is that of ``world_size`` times its own rows' part of ``P``, hence the
average over ranks, which data-parallel training takes, is the gradient of the global loss, also
when ranks hold unequal numbers of rows.

**Scale.** The gradient that arrives at the output does not reveal by what the host multiplied its
loss, so hosts that do must say so (`set_auxiliary_loss_scale`): ``1 / K`` when they divide by
``K`` accumulated micro-batches, the ``GradScaler``'s scale when they use one.

Shape legend:
    L  active expert layers     E  experts
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as collectives

__all__ = ["RoutingSums", "attach", "sum_over_ranks"]


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """What the losses need to know of one forward pass; detached.

    Attributes:
        counts_LE: Rows of all ranks that chose each expert.
        scores_LE: Sum of this rank's scores.
        z_L: Sum of this rank's squared logsumexp.
        top_k: Choices of a row.
    """

    counts_LE: Tensor
    scores_LE: Tensor
    z_L: Tensor
    top_k: int

    def losses_L(self) -> tuple[Tensor, Tensor]:
        """Balance and z of every layer; their averages over ranks are the global batch's."""
        share_LE, weight = _shares(self.counts_LE, self.top_k)
        balance_LE = share_LE * self.scores_LE * weight
        return balance_LE.sum(dim=1) * (balance_LE.shape[1] / self.top_k), self.z_L * weight


def sum_over_ranks(counts_LE: Tensor) -> Tensor:
    """Start to add up the counts of all ranks; reading the result waits for it."""
    if _world_size() == 1:
        return counts_LE
    world = dist.group.WORLD
    assert world is not None
    return collectives.all_reduce(counts_LE, "sum", world)


def attach(
    y: Tensor,
    counts_LE: Tensor,
    scores_LE: Tensor,
    z_L: Tensor,
    top_k: int,
    weights: tuple[float, float],
) -> Tensor:
    """Return ``y``; its backward also adds the gradient of the weighted losses.

    Args:
        y: A site's output.
        counts_LE: Rows of all ranks that chose each expert.
        scores_LE: Sum over this rank's rows of their scores.
        z_L: Sum over this rank's rows of their squared logsumexp.
        top_k: Choices of a row.
        weights: Of balance and of z.
    """
    return _Attach.apply(y, counts_LE, scores_LE, z_L, top_k, weights)


class _Attach(torch.autograd.Function):
    """Identity in ``y``; see `attach`."""

    @staticmethod
    def forward(ctx, y, counts_LE, scores_LE, z_L, top_k, weights):
        ctx.save_for_backward(counts_LE)
        ctx.top_k, ctx.weights = top_k, weights
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (counts_LE,) = ctx.saved_tensors
        balance_weight, z_weight = ctx.weights
        L, E = counts_LE.shape
        share_LE, weight = _shares(counts_LE, ctx.top_k)
        grad_scores_LE = share_LE * weight * (balance_weight * E / (ctx.top_k * L))
        grad_z_L = (weight * (z_weight / L)).expand(L)
        return grad_y, None, grad_scores_LE, grad_z_L, None, None


def _shares(counts_LE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The global hard shares, and what turns a sum over local rows into a global mean's part."""
    rows = (counts_LE[0].sum() / top_k).clamp(min=1)  # a batch without rows has no loss
    return counts_LE / rows, _world_size() / rows


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
