r"""Batch norm over the global batch, whichever rank its rows are on.

``nn.BatchNorm1d`` normalises by the rows of one rank: the model then depends on the number of
ranks, and each rank gathers running statistics of its own, which TorchRec's data parallelism does
not share. Here every rank uses, and remembers, the statistics of all rows. A rank tells the others
``2 C + 1`` numbers in forward, and ``2 C`` in backward; a single process computes exactly what
``nn.BatchNorm1d`` does.

One row, or none, has no variance: such a batch is normalised by the running statistics, and leaves
them as they are.

All ranks must run the same training forwards, also those without a row. Evaluation exchanges
nothing.

Shape legend:
    N  rows of this rank
    C  features
    R  ranks
"""

from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["BatchStatistics", "GlobalBatchNorm", "batch_statistics", "sum_over_ranks", "world_size"]

# Opaque to FX: it asks for shapes and the process group, and updates running statistics.
torch.fx.wrap("normalise")


class GlobalBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d`` over the rows of all ranks.

    It is torch's own base class that is extended, so that what freezes running statistics by type
    finds it; names of parameters and buffers are those of ``nn.BatchNorm1d``.

    Args:
        num_features: ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        affine: Whether each feature is scaled and shifted after it is normalised.

    Shape:
        - input and output ``(N, C)``

    Example:
        >>> norm = GlobalBatchNorm(3)
        >>> norm(torch.randn(8, 3)).mean(dim=0).abs().max() < 1e-6
        tensor(True)
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
        """Return the normalised rows, ``(N, C)``."""
        return normalise(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.training,
            self.momentum,
            self.eps,
        )


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Of the rows of all ranks.

    Attributes:
        mean_C: Their mean.
        var_C: Their variance, divided by the number of rows.
        rows: ``()``, how many there are.
    """

    mean_C: Tensor
    var_C: Tensor
    rows: Tensor

    @property
    def enough(self) -> Tensor:
        """``()``, whether there are rows enough for a variance."""
        return self.rows > 1

    def update(
        self, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float
    ) -> None:
        """Move the running statistics, in place, if there are rows enough."""
        step = self.enough.to(running_mean.dtype) * momentum
        unbiased_C = self.var_C * (self.rows / (self.rows - 1).clamp(min=1))
        running_mean.add_(step * (self.mean_C - running_mean))
        running_var.add_(step * (unbiased_C - running_var))
        batches.add_(self.enough)


def batch_statistics(x_NC: Tensor) -> BatchStatistics:
    """Combine the means and squared deviations of each rank's rows; not differentiable."""
    x_NC = x_NC.detach().to(torch.promote_types(x_NC.dtype, torch.float32))
    size, local = world_size(), x_NC.shape[0]
    if local:
        var_C, mean_C = torch.var_mean(x_NC, dim=0, correction=0)
    else:
        var_C = mean_C = x_NC.new_zeros(x_NC.shape[1])
    rows = mean_C.new_full((), local)
    if size == 1:
        return BatchStatistics(mean_C=mean_C, var_C=var_C, rows=rows)
    world = dist.group.WORLD
    assert world is not None
    mine = torch.cat([rows[None], mean_C, var_C])
    all_R = collectives.all_gather_tensor(mine, 0, world).unflatten(0, (size, -1))
    rows_R1 = all_R[:, :1]
    share_R1 = rows_R1 / rows_R1.sum().clamp(min=1)
    mean_RC, var_RC = all_R[:, 1:].chunk(2, dim=1)
    mean_C = (share_R1 * mean_RC).sum(dim=0)
    var_C = (share_R1 * (var_RC + (mean_RC - mean_C).square())).sum(dim=0)
    return BatchStatistics(mean_C=mean_C, var_C=var_C, rows=rows_R1.sum())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up the values of all ranks; not differentiable."""
    if world_size() == 1:
        return values
    world = dist.group.WORLD
    assert world is not None
    return collectives.all_reduce(values, "sum", world)


def world_size() -> int:
    """Ranks of the job; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def normalise(
    x_NC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:class:`GlobalBatchNorm`'s maths; the running statistics are updated in place."""
    if training and world_size() > 1:
        return _OverRanks.apply(
            x_NC, weight_C, bias_C, running_mean, running_var, batches, momentum, eps
        )
    training = training and x_NC.shape[0] > 1
    if training:
        batches.add_(1)
    return F.batch_norm(x_NC, running_mean, running_var, weight_C, bias_C, training, momentum, eps)


class _OverRanks(torch.autograd.Function):
    """Batch norm whose means, in forward and in backward, are those of all ranks' rows."""

    @staticmethod
    def forward(ctx, x_NC, weight_C, bias_C, running_mean, running_var, batches, momentum, eps):
        batch = batch_statistics(x_NC)
        mean_C = torch.where(batch.enough, batch.mean_C, running_mean)
        scale_C = torch.where(batch.enough, batch.var_C, running_var).add(eps).rsqrt()
        batch.update(running_mean, running_var, batches, momentum)
        ctx.save_for_backward(x_NC, weight_C, mean_C, scale_C, batch.rows)
        y_NC = (x_NC - mean_C) * scale_C
        if weight_C is not None:
            y_NC = y_NC * weight_C + bias_C
        return y_NC.to(x_NC.dtype)

    @staticmethod
    def backward(ctx, grad_NC):
        x_NC, weight_C, mean_C, scale_C, rows = ctx.saved_tensors
        normal_NC = (x_NC - mean_C) * scale_C
        bias_grad_C = grad_NC.sum(dim=0, dtype=mean_C.dtype)
        weight_grad_C = (grad_NC * normal_NC).sum(dim=0)
        both_2C = sum_over_ranks(torch.stack([bias_grad_C, weight_grad_C]))
        # Running statistics, which serve too few rows, do not depend on them.
        mean_2C = both_2C * ((rows > 1) / rows.clamp(min=1))
        centred_NC = grad_NC - mean_2C[0] - normal_NC * mean_2C[1]
        if weight_C is None:
            return (centred_NC * scale_C).to(x_NC.dtype), *(None,) * 7
        x_grad_NC = (centred_NC * (scale_C * weight_C)).to(x_NC.dtype)
        weight_grads = (weight_grad_C.to(weight_C.dtype), bias_grad_C.to(weight_C.dtype))
        return x_grad_NC, *weight_grads, *(None,) * 5
