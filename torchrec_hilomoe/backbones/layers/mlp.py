"""The multi-layer perceptron that ends every backbone.

Shape legend:
    B  rows
    D  input width
"""

from collections.abc import Sequence

from torch import nn, Tensor

__all__ = ["MLP"]


class MLP(nn.Module):
    """Hidden layers, each linear, batch norm (optional), ReLU, dropout; then one output.

    Args:
        in_features: ``D``.
        hidden: Widths of the hidden layers.
        dropout: Share of hidden units dropped in training.
        batch_norm: Whether to normalise before the activation.

    Shape:
        - input ``(B, D)``, output ``(B,)``

    Raises:
        ValueError: If a layer would have no unit.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if any(units < 1 for units in hidden):
            raise ValueError(
                f"MLP.hidden must be widths of at least 1, got {tuple(hidden)}. "
                "Correct model.head, or leave it empty for a linear head."
            )
        layers: list[nn.Module] = []
        width = in_features
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = units
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width, 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return one number a row."""
        return self.output(self.hidden(x_BD)).squeeze(-1)
