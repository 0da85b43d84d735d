r"""Dice, the activation that adapts to its data (Zhou et al., 2018, arXiv 1706.06978).

Shape legend:
    N  rows of this rank, valid events or samples
    C  units
"""

import torch
from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm

__all__ = ["Dice"]


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
                [0., 0., 0.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.bn = GlobalBatchNorm(units, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(units))

    def forward(self, x_NC: Tensor) -> Tensor:
        """Activate; shapes are in the class docstring."""
        gate_NC = torch.sigmoid(self.bn(x_NC))
        return gate_NC * x_NC + self.alpha * (1 - gate_NC) * x_NC
