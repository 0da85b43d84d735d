"""A stage as data: who computes, who learns, how fast, and for how long."""

import math
from dataclasses import dataclass
from typing import get_args, Literal

from torchrec_hilomoe.config.rates import Decay, DecayKind

__all__ = ["OptimizerName", "Plateau", "Stage"]

OptimizerName = Literal["adam", "adamw", "sgd", "adagrad"]
Watched = Literal["auc", "gauc", "logloss", "ne"]
RISING = ("auc", "gauc")  # the others are better when they fall


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Ends a stage when the validation metric stops improving.

    Attributes:
        metric: Which one: ``auc``, ``gauc``, ``logloss`` or ``ne``.
        patience: Validations in a row, without an improvement, that end the stage.
        min_delta: By how much a metric must change to be an improvement.

    Raises:
        ValueError: If an option is out of range.
    """

    metric: Watched = "auc"
    patience: int = 2
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in get_args(Watched):
            raise ValueError(
                f"plateau.metric is {self.metric!r}; take one of {', '.join(get_args(Watched))}."
            )
        if self.patience < 1:
            raise ValueError(f"plateau.patience must be at least 1, got {self.patience}.")
        if not self.min_delta >= 0:
            raise ValueError(f"plateau.min_delta must not be negative, got {self.min_delta}.")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best`` by enough; a value that is no number is not."""
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        gain = value - best if self.metric in RISING else best - value
        return gain > self.min_delta


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: Shown while it runs and written with every metric.
        steps: Its length in optimizer steps.
        epochs: Its length in passes over the training split.
        share: Its length as a share of the run's steps. With none of the three, it takes what is
            left.
        plateau: Ends it sooner; its length is then the longest that it may take.
        active_layers: Expert layers that compute; None is all of them.
        learning_layers: Expert layers that learn, counted from 1; None is every active one.
        train_backbone: Whether everything learns that is neither table nor expert.
        train_tables: Whether embedding tables learn.
        optimizer: Of backbone and experts: ``adam``, ``adamw``, ``sgd`` or ``adagrad``; None is the
            run's. Its state stays where it is while another one learns.
        weight_decay: Of the dense matrices, biases and norms excepted; None is the run's.
        rate: Factor on the learning rates of tables and backbone.
        expert_rate: Factor on the backbone's learning rate for experts.
        warmup_steps: Steps over which the rates rise linearly from zero.
        decay: How rates fall within the stage, in place of the run's: ``constant``, ``linear``,
            ``cosine`` or ``step``.
        decay_every: Steps between two falls of ``step``.
        decay_factor: What a fall of ``step`` multiplies the rates by.
        decay_floor: The least that is left of the rates.

    Raises:
        ValueError: If a length, a layer or a rate is out of range, or nothing learns.
    """

    name: str
    steps: int | None = None
    epochs: float | None = None
    share: float | None = None
    plateau: Plateau | None = None
    active_layers: int | None = None
    learning_layers: tuple[int, ...] | None = None
    train_backbone: bool = True
    train_tables: bool = True
    optimizer: OptimizerName | None = None
    weight_decay: float | None = None
    rate: float = 1.0
    expert_rate: float = 5.0
    warmup_steps: int = 0
    decay: DecayKind | None = None
    decay_every: int | None = None
    decay_factor: float = 0.1
    decay_floor: float = 0.0

    def __post_init__(self) -> None:
        where = f"Stage {self.name!r}"
        self._check_length(where)
        self._check_layers(where)
        self._check_rates(where)
        if not (self.train_backbone or self.train_tables or self.experts_learn):
            raise ValueError(
                f"{where} trains nothing: train_backbone and train_tables are false and no expert "
                "layer learns. Switch one of them on or drop the stage."
            )

    @property
    def experts_learn(self) -> bool:
        """Whether an expert layer may learn in this stage."""
        return self.active_layers != 0 and self.learning_layers != ()

    @property
    def is_open(self) -> bool:
        """Whether it takes what is left."""
        return self.steps is None and self.epochs is None and self.share is None

    @property
    def own_decay(self) -> Decay | None:
        """How rates fall over its own steps; None leaves that to the run."""
        if self.decay is None:
            return None
        return Decay(
            kind=self.decay,
            every=self.decay_every,
            factor=self.decay_factor,
            floor=self.decay_floor,
        )

    def _check_length(self, where: str) -> None:
        lengths = {"steps": self.steps, "epochs": self.epochs, "share": self.share}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) > 1:
            shown = " and ".join(f"{name} = {value}" for name, value in given.items())
            raise ValueError(f"{where}: {shown} are both given; keep one.")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"{where}: steps must be at least 0, got {self.steps}.")
        if self.epochs is not None and not 0 <= self.epochs < math.inf:
            raise ValueError(f"{where}: epochs must be at least 0, got {self.epochs}.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"{where}: share must be between 0 and 1, got {self.share}.")

    def _check_layers(self, where: str) -> None:
        if self.active_layers is not None and self.active_layers < 0:
            raise ValueError(
                f"{where}: active_layers must be at least 0, got {self.active_layers}."
            )
        for layer in self.learning_layers or ():
            if layer < 1 or (self.active_layers is not None and layer > self.active_layers):
                raise ValueError(
                    f"{where}: learning_layers = {self.learning_layers} names layer {layer}, but "
                    f"layers 1 to {self.active_layers} compute. Raise active_layers or drop it."
                )

    def _check_rates(self, where: str) -> None:
        if min(self.rate, self.expert_rate, self.warmup_steps) < 0:
            raise ValueError(
                f"{where}: rate = {self.rate}, expert_rate = {self.expert_rate} and "
                f"warmup_steps = {self.warmup_steps} must not be negative."
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"{where}: weight_decay must not be negative, got {self.weight_decay}."
            )
        if self.optimizer is not None and self.optimizer not in get_args(OptimizerName):
            names = ", ".join(get_args(OptimizerName))
            raise ValueError(f"{where}: optimizer is {self.optimizer!r}; take one of {names}.")
        try:
            _ = self.own_decay
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
