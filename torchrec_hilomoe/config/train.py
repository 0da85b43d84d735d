"""How a model learns."""

from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.training.stages import Stage

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it learns.

    Attributes:
        max_steps: Optimizer steps of the run; null trains ``epochs`` epochs.
        epochs: Passes over the training split, when ``max_steps`` is null.
        batch_size: Rows of a global batch, over all ranks.
        learning_rate: Adam's, for everything that is not a table.
        table_optimizer: Fused into the tables' backward pass.
        table_learning_rate: Its rate.
        decay: How the rates fall over the run, to zero: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: Linear warm-up of the first stage; expert stages take a tenth.
        backbone_share: Share of the run in stage ``backbone_warmup``.
        frozen_share: Share of the run in all stages ``expert_warmup`` together.
        expert_rate: The experts' factor on ``learning_rate``.
        stages: A schedule of one's own; replaces the four options above.
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; null validates at the end only.
        device: ``auto`` takes a GPU when there is one.
    """

    max_steps: int | None = None
    epochs: int = 1
    batch_size: int = 1024
    learning_rate: float = 1e-3
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    table_learning_rate: float = 0.05
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 100
    backbone_share: float = 0.2
    frozen_share: float = 0.06
    expert_rate: float = 5.0
    stages: tuple[Stage, ...] | None = None
    log_every: int = 50
    evaluate_every: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "table_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be above 0, got {getattr(self, name)}.")
        for name in ("max_steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1 or null, got {value}.")
