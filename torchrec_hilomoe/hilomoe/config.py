"""What a HiLoMoE site is: sizes, routing options, loss weights.

The one place where the options of a site are named, explained and checked. Modules take this
dataclass whole, because every site of a model shares it and checkpoints store it.
"""

import math
from dataclasses import dataclass
from typing import get_args, Literal

__all__ = ["Backend", "HiLoMoEConfig", "QueryUpdate", "StopGradient"]

QueryUpdate = Literal["soft", "selected"]
StopGradient = Literal["none", "scores", "query"]
Backend = Literal["auto", "eager", "compiled", "triton"]


@dataclass(frozen=True, kw_only=True)
class HiLoMoEConfig:
    """Options of a HiLoMoE site.

    Attributes:
        num_layers: Number of expert layers on the base linear map (``L``).
        num_experts: Number of experts of a layer (``E``).
        rank: Number of outer products of an expert (``R``); 1 in the paper.
        top_k: Number of experts of a layer that a row uses.
        query_dim: Width of the routing query, in features (``Q``); null routes on the input itself.
        tie_keys: Whether the experts' own down-vectors are their keys: half the routing parameters.
        query_norm: Whether the first query is divided by its root mean square.
        query_update: Whether a layer passes all of its scores on to the next query (``"soft"``) or
            only those of the experts that it selected (``"selected"``).
        stop_gradient: Gradient that is not passed on: ``"scores"`` hides a layer's scores from the
            gradient of the next layer's query, ``"query"`` hides the input from the gradient of
            all routing.
        alpha: Factor on the experts' correction.
        balance_weight: Weight of the load-balancing loss; 1 is the loss of a balanced layer.
        z_weight: Weight of the loss that keeps logits small.
        backend: Implementation of a site's computation: ``"auto"`` picks what the sizes and the
            machine favour; any other value is used or refused, never replaced.

    Raises:
        ValueError: If a value is out of its range, or two values exclude each other.

    Example:
        >>> config = HiLoMoEConfig(num_layers=2, num_experts=4, rank=4)
        >>> config.num_experts**config.num_layers  # the paths that a row can take
        16
    """

    num_layers: int = 3
    num_experts: int = 8
    rank: int = 1
    top_k: int = 1
    query_dim: int | None = None
    tie_keys: bool = False
    query_norm: bool = False
    query_update: QueryUpdate = "soft"
    stop_gradient: StopGradient = "none"
    alpha: float = 1.0
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "rank", "top_k"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"HiLoMoEConfig.{name} must be at least 1, got {value}. "
                    "For a site without experts keep nn.Linear."
                )
        for name in ("balance_weight", "z_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"HiLoMoEConfig.{name} must be zero or a positive number, got {value}. "
                    "Use 0 to switch this loss off."
                )
        if not math.isfinite(self.alpha):
            raise ValueError(
                f"HiLoMoEConfig.alpha must be a finite number, got {self.alpha}. Use 1.0."
            )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"HiLoMoEConfig.{name} must be one of {', '.join(allowed)}, got {value!r}."
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"HiLoMoEConfig.top_k = {self.top_k} is larger than num_experts = "
                f"{self.num_experts}. Lower top_k or add experts."
            )
        if self.query_dim is not None and self.query_dim < 1:
            raise ValueError(
                f"HiLoMoEConfig.query_dim must be at least 1, got {self.query_dim}. "
                "Use None to route on the input itself."
            )
        if self.tie_keys and self.rank != 1:
            raise ValueError(
                f"HiLoMoEConfig.tie_keys = True needs rank = 1, got rank = {self.rank}: an expert "
                "of higher rank has no single down-vector. Use rank=1 or tie_keys=False."
            )
        if self.tie_keys and self.query_dim is not None:
            raise ValueError(
                f"HiLoMoEConfig.tie_keys = True needs query_dim = None, got query_dim = "
                f"{self.query_dim}: down-vectors are as wide as the input. "
                "Use query_dim=None or tie_keys=False."
            )


_CHOICES = {
    "query_update": get_args(QueryUpdate),
    "stop_gradient": get_args(StopGradient),
    "backend": get_args(Backend),
}
