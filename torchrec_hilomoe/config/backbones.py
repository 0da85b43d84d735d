"""Options of each backbone; what several share is in ``ModelConfig``."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.backbones.layers.mlp import Activation

__all__ = ["BSTConfig", "DINConfig"]


@dataclass(frozen=True, kw_only=True)
class BSTConfig:
    """Options of :class:`torchrec_hilomoe.backbones.bst.BST`.

    Attributes:
        num_layers: Transformer layers.
        num_heads: Attention heads.
        residual: Whether attention and feed-forward add to their inputs.
        layer_norm: Whether they are normalised.
        pooling: ``target`` or ``mean``.
    """

    num_layers: int = 1
    num_heads: int = 4
    residual: bool = True
    layer_norm: bool = False
    pooling: Literal["target", "mean"] = "target"


@dataclass(frozen=True, kw_only=True)
class DINConfig:
    """Options of :class:`torchrec_hilomoe.backbones.din.DIN`.

    Attributes:
        attention_units: Hidden widths of the attention's MLP.
        attention_activation: Of those.
        attention_dropout: Share of those units dropped in training.
        softmax: Whether the weights of a history sum to one.
        head_activation: Of the head's hidden layers.
    """

    attention_units: tuple[int, ...] = (64,)
    attention_activation: Activation = "dice"
    attention_dropout: float = 0.0
    softmax: bool = False
    head_activation: Activation = "relu"
