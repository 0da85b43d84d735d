"""Options of each backbone; what several share is in ``ModelConfig``."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.backbones.layers.gating import Gating
from torchrec_hilomoe.backbones.layers.mlp import Activation

__all__ = ["BSTConfig", "DIENConfig", "DINConfig", "InterFormerConfig", "TransActConfig"]


@dataclass(frozen=True, kw_only=True)
class BSTConfig:
    """Options of :class:`torchrec_hilomoe.backbones.bst.BST`.

    Attributes:
        num_layers: Transformer layers.
        num_heads: Attention heads.
        residual: Whether attention and feed-forward add to their inputs.
        layer_norm: Whether they are normalised.
        positions: Whether a token says how far it is from the target.
        pooling: ``target`` or ``mean``.
        dropout: Inside the transformer; null is the model's.
    """

    num_layers: int = 1
    num_heads: int = 4
    residual: bool = True
    layer_norm: bool = False
    positions: bool = True
    pooling: Literal["target", "mean"] = "target"
    dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class DIENConfig:
    """Options of :class:`torchrec_hilomoe.backbones.dien.DIEN`.

    Attributes:
        attention: How the target weighs states: ``mlp`` as DIN does, ``bilinear`` by a learned
            product, ``dot`` by the plain one.
        attention_units: Hidden widths of the MLP.
        attention_activation: Of those.
        attention_dropout: Share of those units dropped in training.
        auxiliary_weight: Of the loss that a state knows the event after it; 0 leaves it out.
        auxiliary_units: Hidden widths of that loss's MLP.
        head_activation: Of the head's hidden layers.
    """

    attention: Literal["mlp", "bilinear", "dot"] = "mlp"
    attention_units: tuple[int, ...] = (80, 40)
    attention_activation: Activation = "dice"
    attention_dropout: float = 0.0
    auxiliary_weight: float = 0.0
    auxiliary_units: tuple[int, ...] = (100, 50)
    head_activation: Activation = "relu"


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
class InterFormerConfig:
    """Options of :class:`torchrec_hilomoe.backbones.interformer.InterFormer`.

    Attributes:
        num_layers: Layers in which context and history read each other.
        interaction_layers: Of DHEN, in each of those.
        num_heads: Attention heads; each gets an even number of an embedding's features.
        cls_tokens: Tokens of the context's summary, prepended to the history.
        pooled_tokens: Of the history's summary, by attention pooling.
        recent_tokens: Of the history's summary, the latest events.
        gating: Of the summaries: ``printed`` as the paper's equation, or ``self``.
        residual: Whether the history's side adds to its inputs.
    """

    num_layers: int = 2
    interaction_layers: int = 1
    num_heads: int = 2
    cls_tokens: int = 4
    pooled_tokens: int = 2
    recent_tokens: int = 2
    gating: Gating = "printed"
    residual: bool = False


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
