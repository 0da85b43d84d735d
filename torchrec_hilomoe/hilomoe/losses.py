r"""Auxiliary losses over the global batch, which train the routers inside the host's backward.

A site must not ask its host to add a loss term. So the gradient of the auxiliary losses joins where
the output's gradient passes through the routing: whatever loss the host computes from the output,
one backward through it trains the routers once. Nothing is added where there is no backward.

**Global batch.** With ``f`` the share of all ranks' rows that chose an expert and ``P`` its mean
score over them, balance is ``(E / k) sum_e f_e P_e``. The shares are not differentiable, so counts
are all-reduced (a few numbers, started in forward, waited for in backward); the number of rows of
all ranks comes with them, since every row makes ``k`` choices. ``P`` is differentiable and stays
local: each rank's gradient is that of ``world_size`` times its own rows' part of ``P``, hence the
average over ranks, which data-parallel training takes, is the gradient of the global loss, also
when ranks hold unequal numbers of rows. All ranks must run the same training forwards.

**Scale.** The gradient that arrives at the output does not reveal by what the host multiplied its
loss, so hosts that do must say so (`sites.set_auxiliary_loss_scale`): ``1 / K`` when they divide
by ``K`` accumulated micro-batches, the ``GradScaler``'s scale when they use one.

Shape legend:
    N  rows     L  active expert layers     E  experts
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

__all__ = [
    "LossGradients",
    "RoutingLosses",
    "RoutingRecord",
    "choice_counts",
    "loss_gradients",
    "sum_over_ranks",
]


@dataclass(frozen=True, kw_only=True)
class RoutingLosses:
    """This rank's part of the unweighted losses; the average over ranks is the global batch's."""

    balance_L: Tensor
    z_L: Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """What the losses need to know of a forward pass; they are computed when asked for.

    Attributes:
        counts_LE: Choices of each expert by the rows of all ranks.
        scores_LEN: This rank's scores.
        logsumexp_LN: Of this rank's logits.
        top_k: Choices of a row.
    """

    counts_LE: Tensor
    scores_LEN: Tensor
    logsumexp_LN: Tensor
    top_k: int

    def losses(self) -> RoutingLosses:
        """Waits for the other ranks' counts."""
        rows = _rows(self.counts_LE, self.top_k, self.scores_LEN.shape[2])
        E, part = self.counts_LE.shape[1], _world_size() / rows
        balance_L = (self.counts_LE * self.scores_LEN.sum(dim=2)).sum(dim=1)
        return RoutingLosses(
            balance_L=balance_L * (E / self.top_k / rows * part),
            z_L=self.logsumexp_LN.square().sum(dim=1) * part,
        )


@dataclass(frozen=True, kw_only=True)
class LossGradients:
    """Of a site's weighted loss.

    Attributes:
        scores_LE: By the scores of each local row.
        z: By the squared logsumexp of each local row and layer.
    """

    scores_LE: Tensor
    z: Tensor | float


def choice_counts(chosen_LkN: Tensor, num_experts: int) -> Tensor:
    """How many rows chose each expert; ``(L, E)``."""
    chosen_LF = chosen_LkN.flatten(1)
    zeros_LE = chosen_LF.new_zeros(len(chosen_LF), num_experts)
    return zeros_LE.scatter_add_(1, chosen_LF, torch.ones_like(chosen_LF))


def sum_over_ranks(counts_LE: Tensor) -> Tensor:
    """Start to add up the counts of all ranks; reading the result waits for it."""
    if _world_size() == 1:
        return counts_LE
    world = dist.group.WORLD
    assert world is not None
    return collectives.all_reduce(counts_LE, "sum", world)


def loss_gradients(
    counts_LE: Tensor, num_rows: int, top_k: int, weights: tuple[float, float]
) -> LossGradients:
    """The gradient of a site's loss, which is the weighted mean over its layers.

    Args:
        counts_LE: Choices of each expert by the rows of all ranks.
        num_rows: This rank's rows.
        top_k: Choices of a row.
        weights: Of balance and of z.
    """
    (L, E), (balance_weight, z_weight) = counts_LE.shape, weights
    rows = _rows(counts_LE, top_k, num_rows)
    part = _world_size() / rows / L
    return LossGradients(
        scores_LE=counts_LE * (balance_weight * E / top_k / rows * part), z=part * z_weight
    )


def _rows(counts_LE: Tensor, top_k: int, num_rows: int) -> Tensor | int:
    """The rows of all ranks; at least 1, because a batch without rows has no loss."""
    if _world_size() == 1:
        return max(num_rows, 1)
    return (counts_LE[0].sum() / top_k).clamp(min=1)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
