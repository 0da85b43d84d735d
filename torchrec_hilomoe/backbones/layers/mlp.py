"""The multi-layer perceptron: hidden layers, and the head that ends every backbone.

Shape legend:
    B  rows
    D  input width
    H  width of the last hidden layer
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from torch import nn, Tensor

from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm
from torchrec_hilomoe.backbones.layers.dice import Dice

__all__ = ["ACTIVATIONS", "MLP", "Activation", "hidden_layers"]

Activation = Literal[
    "relu", "leaky_relu", "prelu", "dice", "silu", "gelu", "tanh", "sigmoid", "none"
]

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
