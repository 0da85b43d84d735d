"""Options of each backbone; what several share is in ``ModelConfig``."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["BSTConfig"]


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
