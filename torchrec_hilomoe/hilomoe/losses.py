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
when ranks hold unequal numbers of rows. All ranks must run the same training forwards; they are all
of the job, or those of a group (`inject.set_process_group`).

**Scale.** The gradient that arrives at the output does not reveal by what the host multiplied its
loss, so hosts that do must say so (`inject.set_auxiliary_loss_scale`): ``1 / K`` when they divide
by ``K`` accumulated micro-batches, the ``GradScaler``'s scale when they use one.

Other parts of a model may lose something, too, as DIEN's history does: :class:`AttachedLoss` hangs
such a term on a tensor that the host's loss depends on, passes that tensor's gradient on, and
starts its own.

Shape legend:
    N  rows     L  active expert layers     E  experts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn, Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.ranks import RankGroup, size_of, sum_over_ranks

__all__ = [
    "AttachedLoss",
    "LossGradients",
    "LossWeights",
    "RoutingLosses",
    "RoutingRecord",
    "attached_losses",
    "choice_counts",
    "loss_gradients",
    "loss_weights",
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
        ranks: How many there are.
    """

    counts_LE: Tensor
    scores_LEN: Tensor
    logsumexp_LN: Tensor
    top_k: int
    ranks: int

    def losses(self) -> RoutingLosses:
        """Waits for the other ranks' counts."""
        rows = _rows(self.counts_LE, self.top_k, self.scores_LEN.shape[2], self.ranks)
        E, part = self.counts_LE.shape[1], self.ranks / rows
        balance_L = (self.counts_LE * self.scores_LEN.sum(dim=2)).sum(dim=1)
        return RoutingLosses(
            balance_L=balance_L * (E / self.top_k / rows * part),
            z_L=self.logsumexp_LN.square().sum(dim=1) * part,
        )


class LossWeights(NamedTuple):
    """What an operator is told of the losses, as the numbers that it can take.

    Attributes:
        balance: Weight of the balance loss.
        z: Weight of the z loss.
        ranks: Number of ranks over which counts are added up.
    """

    balance: float
    z: float
    ranks: float


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


def loss_gradients(
    counts_LE: Tensor, num_rows: int, top_k: int, weights: Sequence[float]
) -> LossGradients:
    """The gradient of a site's loss, which is the weighted mean over its layers.

    Args:
        counts_LE: Choices of each expert by the rows of all ranks.
        num_rows: This rank's rows.
        top_k: Choices of a row.
        weights: As :class:`LossWeights`.
    """
    (L, E), (balance_weight, z_weight, ranks) = counts_LE.shape, weights
    rows = _rows(counts_LE, top_k, num_rows, ranks)
    part = ranks / rows / L
    return LossGradients(
        scores_LE=counts_LE * (balance_weight * E / top_k / rows * part), z=part * z_weight
    )


def loss_weights(
    config: HiLoMoEConfig, scale: float, group: RankGroup | None
) -> LossWeights | None:
    """Of balance and z in a training pass; None where no loss would be learned from."""
    balance, z = config.balance_weight * scale, config.z_weight * scale
    if not torch.is_grad_enabled() or (balance, z) == (0.0, 0.0):
        return None
    return LossWeights(balance=balance, z=z, ranks=float(size_of(group)))


def wide(t: Tensor) -> Tensor:
    """At least float32: logits are compared, and half precision cannot hold sums of them."""
    return t if t.dtype == torch.float64 else t.float()


def _rows(counts_LE: Tensor, top_k: int, num_rows: int, ranks: float) -> Tensor | int:
    """The rows of all ranks; at least 1, because a batch without rows has no loss."""
    if ranks == 1:
        return max(num_rows, 1)
    return (counts_LE[0].sum() / top_k).clamp(min=1)


# Opaque to FX: they ask for the process group.
for _name in ("attach", "mean_of_ranks"):
    torch.fx.wrap(_name)


class AttachedLoss(nn.Module):
    """The weighted mean, over the items of all ranks, of what a part of the model loses on each.

    Args:
        weight: Of this term beside the host's loss.

    Attributes:
        scale: Factor on the gradient; set for a whole model by ``set_auxiliary_loss_scale``.
        group: Over which ranks the mean is; set for a whole model by ``set_process_group``.

    Example:
        >>> attached, x = AttachedLoss(0.5), torch.ones(2, requires_grad=True)
        >>> y = attached(x, lost=(3 * x).sum(), items=torch.tensor(2))
        >>> y.sum().backward()
        >>> x.grad, attached.value
        (tensor([1.7500, 1.7500]), tensor(3.))
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale = 1.0
        self.group: RankGroup | None = None
        self._value: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether a forward now would have something to attach."""
        return self.training and torch.is_grad_enabled() and self.weight * self.scale != 0

    @property
    def value(self) -> Tensor | None:
        """This rank's part in the last training forward, unweighted and detached.

        The average over ranks is the mean over all items; None before there was a forward.
        """
        return self._value

    def forward(self, carrier: Tensor, lost: Tensor, items: Tensor) -> Tensor:
        """Return ``carrier``, with the loss hanging on it.

        Args:
            carrier: What the host's loss depends on.
            lost: ``()``, the sum over this rank's items.
            items: ``()``, how many there are.
        """
        if not self.learns:
            return carrier
        mean = mean_of_ranks(lost, items, self.group)
        if isinstance(mean, Tensor):  # an FX proxy is no value to keep
            self._value = mean.detach()
        return attach(carrier, mean, self.weight * self.scale)

    def extra_repr(self) -> str:
        """What it weighs."""
        return f"weight={self.weight}"

    def __getstate__(self) -> dict:
        """Copies and pickles start without the last pass's value."""
        return {**super().__getstate__(), "_value": None}


def attached_losses(model: nn.Module) -> dict[str, AttachedLoss]:
    """The model's attached losses by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AttachedLoss)}


def mean_of_ranks(lost: Tensor, items: Tensor, group: RankGroup | None) -> Tensor:
    """Divide by the mean number of items a rank has, so that ranks' average is the mean of all."""
    items = items.detach().long()
    mine = torch.stack([items, torch.ones_like(items)])
    all_items, ranks = sum_over_ranks(mine, group).unbind()
    return lost * ranks / all_items.clamp(min=1)


def attach(carrier: Tensor, loss: Tensor, weight: float) -> Tensor:
    """Return ``carrier``; its backward is also ``weight`` times that of ``loss``."""
    return _Attach.apply(carrier, loss, weight)


class _Attach(torch.autograd.Function):
    """See `attach`."""

    @staticmethod
    def forward(ctx, carrier, loss, weight):
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.weight), None
