"""Options of each backbone; what several share is in ``ModelConfig``."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.backbones.layers.mlp import Activation

__all__ = ["BSTConfig", "DINConfig", "TransActConfig"]


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


@dataclass(frozen=True, kw_only=True)
class TransActConfig:
    """Options of :class:`torchrec_hilomoe.backbones.transact.TransAct`.

    Attributes:
        num_layers: Encoder layers.
        num_heads: Attention heads.
        ffn_width: Hidden width of the encoder's feed-forward maps.
        latest: How many of the latest events the head sees one by one.
        time_window: Seconds before the request of which a random part is hidden in training;
            null hides nothing.
        dropout: Inside the encoder; null is the model's.
        cross_layers: Layers of the head's cross network.
        head_activation: Of the head's hidden layers.
    """

    num_layers: int = 1
    num_heads: int = 2
    ffn_width: int = 512
    latest: int = 1
    time_window: int | None = None
    dropout: float | None = None
    cross_layers: int = 3
    head_activation: Activation = "relu"
