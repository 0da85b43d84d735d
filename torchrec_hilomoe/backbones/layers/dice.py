r"""Dice, the activation that adapts to its data (Zhou et al., 2018, arXiv 1706.06978).

Shape legend:
    N  rows of this rank, valid events or samples
    C  units
"""

import torch
from torch import nn, Tensor
from torch.autograd.function import once_differentiable

from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm

__all__ = ["Dice", "blend"]

# Opaque to FX, which cannot trace a function with a backward pass of its own.
torch.fx.wrap("blend")


class Dice(nn.Module):
    r"""A leaky ReLU whose step is where the data are: half-way at their mean.

    .. math:: y = p x + a (1 - p) x, \quad p = \sigma(\mathrm{norm}(x))

    The norm is over the rows of all ranks. Rows are what is given: the caller leaves padding out.

    Args:
        units: ``C``.

    Shape:
        - input and output ``(N, C)``

    Attributes:
        alpha: ``(C,)``, the slope ``a`` far below the mean; starts at 0.

    Example:
        >>> Dice(3)(torch.zeros(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]], grad_fn=<_BlendBackward>)
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.bn = GlobalBatchNorm(units, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(units))

    def forward(self, x_NC: Tensor) -> Tensor:
        """Activate; shapes are in the class docstring."""
        return blend(x_NC, self.bn(x_NC), self.alpha)


def blend(x_NC: Tensor, normal_NC: Tensor, alpha_C: Tensor) -> Tensor:
    """Return ``p x + a (1 - p) x``, :class:`Dice`'s equation, for ``p`` the sigmoid of ``normal``.

    Differentiable once.
    """
    return _Blend.apply(x_NC, normal_NC, alpha_C)


class _Blend(torch.autograd.Function):
    """Two buffers each way; autograd fills twice as many, and a fresh one costs its page faults."""

    @staticmethod
    def forward(ctx, x_NC, normal_NC, alpha_C):
        gate_NC = torch.sigmoid(normal_NC)
        ctx.save_for_backward(x_NC, gate_NC, alpha_C)
        return (gate_NC * (1 - alpha_C)).add_(alpha_C).mul_(x_NC)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NC):
        x_NC, gate_NC, alpha_C = ctx.saved_tensors
        first_NC = grad_NC * x_NC
        second_NC = first_NC * gate_NC
        alpha_grad_C = first_NC.sum(dim=0) - second_NC.sum(dim=0)
        torch.mul(second_NC, gate_NC, out=first_NC)
        normal_grad_NC = second_NC.sub_(first_NC).mul_(1 - alpha_C)
        x_grad_NC = torch.mul(gate_NC, 1 - alpha_C, out=first_NC).add_(alpha_C).mul_(grad_NC)
        return x_grad_NC, normal_grad_NC, alpha_grad_C
