"""A stage as data: who computes, who learns, how fast, and for how long."""

import math
from dataclasses import dataclass
from typing import get_args, Literal

__all__ = ["Decay", "OptimizerName", "PlateauConfig", "Stage"]

OptimizerName = Literal["adam", "adamw", "sgd", "adagrad"]
Watched = Literal["auc", "gauc", "logloss", "ne"]
RISING = ("auc", "gauc")  # the others are better when they fall


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How learning rates fall over a run or a stage.

    Attributes:
        kind: Form of the decay: ``constant``; ``linear`` or ``cosine`` to ``floor`` over all
            steps; ``step`` by ``factor`` after every ``every`` steps.
        every: Number of steps between two falls of ``step``.
        factor: Factor on the rates at each fall of ``step``, above 0 and up to 1.
        floor: Lowest factor on the rates, from 0 to 1.

    Raises:
        ValueError: If an option is out of range, or ``step`` has no ``every``.

    Example:
        >>> [round(Decay(kind="cosine").at(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [Decay(kind="step", every=2, factor=0.5).at(step, 6) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    every: int | None = None
    factor: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "step" and self.every is None:
            raise ValueError(
                "decay.kind is 'step' and decay.every is null; say after how many steps rates "
                "fall, or take 'cosine'."
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"decay.every must be at least 1 step, got {self.every}.")
        if not (0 < self.factor <= 1 and 0 <= self.floor <= 1):
            raise ValueError(
                f"decay.factor = {self.factor} must lie above 0 and up to 1, and decay.floor = "
                f"{self.floor} between 0 and 1: rates fall."
            )

    def at(self, step: int, steps: int) -> float:
        """Return the factor at ``step``, counted from 0, of ``steps``."""
        if self.kind == "step":
            assert self.every is not None
            return max(self.floor, self.factor ** (step // self.every))
        progress = min(step / steps, 1.0)
        left = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.kind]
        return self.floor + (1.0 - self.floor) * left


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """Ends a stage when the validation metric stops improving.

    Attributes:
        metric: Validation metric that is watched: ``auc``, ``gauc``, ``logloss`` or ``ne``.
        patience: Number of validations in a row without an improvement that end the stage.
        min_delta: Smallest change of the metric that counts as an improvement.

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
        name: Name of the stage, shown while it runs and written with every metric.
        steps: Length of the stage, in optimizer steps.
        epochs: Length of the stage, in passes over the training split.
        share: Length of the stage, as a share of the run's steps. With none of the three, it takes
            what is left.
        plateau: Condition that ends the stage sooner; its length is then the longest that it may
            take.
        active_layers: Number of expert layers that compute; null is all of them.
        learning_layers: Expert layers that learn, counted from 1; null is every active one.
        train_backbone: Whether everything learns that is neither table nor expert.
        train_tables: Whether embedding tables learn.
        optimizer: Optimizer of backbone and experts: ``adam``, ``adamw``, ``sgd`` or ``adagrad``;
            null is the run's. Its state stays where it is while another one learns.
        weight_decay: Weight decay of the dense matrices, biases and norms excepted; null is the
            run's.
        lr_scale: Factor on the learning rates of tables and backbone.
        expert_lr_scale: Factor on the backbone's learning rate for experts.
        key_lr_scale: Factor on the experts' learning rate for the keys, and the projection, that
            route; tied keys (``tie_keys``) learn as the down-vectors that they are.
        warmup_steps: Number of steps over which the rates rise linearly from zero.
        decay: Decay of the learning rates within the stage, in place of the run's.

    Raises:
        ValueError: If a length, a layer or a rate is out of range, or nothing learns.

    Example:
        >>> stage = Stage(name="heads only", steps=100, train_tables=False)
        >>> stage.is_open
        False
    """

    name: str
    steps: int | None = None
    epochs: float | None = None
    share: float | None = None
    plateau: PlateauConfig | None = None
    active_layers: int | None = None
    learning_layers: tuple[int, ...] | None = None
    train_backbone: bool = True
    train_tables: bool = True
    optimizer: OptimizerName | None = None
    weight_decay: float | None = None
    lr_scale: float = 1.0
    expert_lr_scale: float = 5.0
    key_lr_scale: float = 1.0
    warmup_steps: int = 0
    decay: Decay | None = None

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
        factors = (self.lr_scale, self.expert_lr_scale, self.key_lr_scale, self.warmup_steps)
        if not all(0 <= factor < math.inf for factor in factors):
            raise ValueError(
                f"{where}: lr_scale = {self.lr_scale}, expert_lr_scale = {self.expert_lr_scale}, "
                f"key_lr_scale = {self.key_lr_scale} and warmup_steps = {self.warmup_steps} must "
                "not be negative, nor infinite or nan."
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"{where}: weight_decay must not be negative, got {self.weight_decay}."
            )
        if self.optimizer is not None and self.optimizer not in get_args(OptimizerName):
            names = ", ".join(get_args(OptimizerName))
            raise ValueError(f"{where}: optimizer is {self.optimizer!r}; take one of {names}.")
