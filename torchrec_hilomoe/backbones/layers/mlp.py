"""The multi-layer perceptron: hidden layers, and the head that ends every backbone.

One of its activations is Dice, which adapts to its data (Zhou et al., 2018, arXiv 1706.06978).

Shape legend:
    B  rows
    D  input width
    H  width of the last hidden layer
    N  rows of this rank, valid events or samples
    C  units
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn, Tensor
from torch.autograd.function import once_differentiable

from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm

__all__ = ["ACTIVATIONS", "MLP", "Activation", "Dice", "blend", "hidden_layers"]

Activation = Literal[
    "relu", "leaky_relu", "prelu", "dice", "silu", "gelu", "tanh", "sigmoid", "none"
]

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


ACTIVATIONS: Mapping[Activation, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "relu": lambda _: nn.ReLU(),
        "leaky_relu": lambda _: nn.LeakyReLU(),
        "prelu": lambda units: nn.PReLU(units, init=0.1),
        "dice": Dice,
        "silu": lambda _: nn.SiLU(),
        "gelu": lambda _: nn.GELU(),
        "tanh": lambda _: nn.Tanh(),
        "sigmoid": lambda _: nn.Sigmoid(),
        "none": lambda _: nn.Identity(),
    }
)


def hidden_layers(
    in_features: int,
    hidden: Sequence[int],
    *,
    activation: Activation = "relu",
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Layers, each linear, batch norm (optional), activation, dropout; ``(B, D)`` -> ``(B, H)``.

    Args:
        in_features: ``D``.
        hidden: Widths of the layers; with none, the input is returned.
        activation: A name in :data:`ACTIVATIONS`.
        dropout: Share of units dropped in training.
        batch_norm: Whether to normalise, over the global batch, before the activation.

    Raises:
        ValueError: If a layer would have no unit, or the activation is not known.
    """
    if any(units < 1 for units in hidden):
        raise ValueError(
            f"MLP.hidden must be widths of at least 1, got {tuple(hidden)}. "
            "Correct model.head, or leave it empty for a linear head."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"MLP.activation is {activation!r}, which is not known. "
            f"Use one of {', '.join(ACTIVATIONS)}."
        )
    layers: list[nn.Module] = []
    width = in_features
    for units in hidden:
        layers.append(nn.Linear(width, units))
        if batch_norm:
            layers.append(GlobalBatchNorm(units))
        layers.append(ACTIVATIONS[activation](units))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = units
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """:func:`hidden_layers`, whose options these are, then one output.

    Args:
        in_features: ``D``.
        hidden: Widths of the hidden layers.
        activation: Of the hidden layers.
        dropout: Share of hidden units dropped in training.
        batch_norm: Whether to normalise before the activation.

    Shape:
        - input ``(B, D)``, output ``(B,)``

    Raises:
        ValueError: If a layer would have no unit, or the activation is not known.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = hidden_layers(
            in_features, hidden, activation=activation, dropout=dropout, batch_norm=batch_norm
        )
        self.output = nn.Linear(hidden[-1] if hidden else in_features, 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return one number a row."""
        return self.output(self.hidden(x_BD)).squeeze(-1)
