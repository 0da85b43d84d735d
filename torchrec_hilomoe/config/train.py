"""How a model learns."""

import math
from dataclasses import dataclass
from typing import Literal

from torchrec_hilomoe.config.rates import Decay, DecayKind
from torchrec_hilomoe.config.stage import OptimizerName, Plateau, Stage

__all__ = ["TrainConfig"]

AT_LEAST_ONE = ("batch_size", "log_every", "epochs", "accumulate")
ABOVE_ZERO = ("learning_rate", "table_learning_rate", "clip_norm")
NOT_NEGATIVE = ("weight_decay", "table_weight_decay", "momentum", "warmup_steps")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it learns.

    Attributes:
        max_steps: Optimizer steps of the run; null trains ``epochs`` epochs.
        epochs: Passes over the training split, when ``max_steps`` is null.
        batch_size: Rows of a global batch, over all ranks and micro-batches.
        accumulate: Micro-batches into which each rank cuts its share of a batch, to need less
            memory: dense gradients are added up before the step. Tables take a step after each
            micro-batch, because theirs is fused into the backward pass.
        learning_rate: Of everything that is not a table.
        optimizer: Of everything that is not a table: ``adam``, ``adamw``, ``sgd`` or ``adagrad``.
        weight_decay: Of the dense matrices; biases and norms do not decay. L2 on the gradient,
            except with ``adamw``, which decays by itself.
        momentum: Of ``sgd``.
        clip_norm: The longest that all dense gradients may be, as one vector over all
            data-parallel parameters; null does not clip. Tables are not part of it: their
            optimizer is fused into the backward pass, before the norm is known.
        table_optimizer: Fused into the tables' backward pass.
        table_learning_rate: Its rate.
        table_weight_decay: L2 on the rows that a batch looks up, once for each step that looks
            them up; GPUs only. Rows that no batch looks up do not decay, unlike with L2 on
            whole tables.
        decay: How the rates fall over the run: ``constant``, ``linear``, ``cosine`` or ``step``.
        decay_every: Steps between two falls of ``step``.
        decay_factor: What a fall of ``step`` multiplies the rates by.
        decay_floor: The least that is left of the rates.
        warmup_steps: Linear warm-up of the first stage; expert stages take a tenth.
        backbone_share: Share of the run in stage ``backbone_warmup``.
        frozen_share: Share of the run in all stages ``expert_warmup`` together.
        expert_rate: The experts' factor on ``learning_rate``.
        stages: A schedule of one's own; replaces the four options above.
        init_optimizer: Whether ``init_from`` takes over optimizer states too.
        pipeline: How steps overlap: ``base`` copies ahead, ``sparse_dist`` exchanges ids ahead
            too; on GPUs also ``prefetch``, which fills the caches of tables in host memory ahead,
            and ``semi_sync``, which looks up one step early, in tables that are one step old.
        debug: Train without a pipeline: the same steps, one after the other.
        precision: What the dense part computes in: ``fp32``, or ``bf16`` or ``fp16`` under
            autocast. Parameters, tables and optimizer states stay float32.
        compile: Whether the dense part goes through ``torch.compile``.
        log_every: Steps between two lines of training metrics.
        evaluate_every: Steps between two validations; null validates at the end only.
        early_stopping: Ends the run when a validation metric no longer improves in its last stage;
            null trains to the end.
        device: ``auto`` takes a GPU when there is one.
    """

    max_steps: int | None = None
    epochs: int = 1
    batch_size: int = 1024
    accumulate: int = 1
    learning_rate: float = 1e-3
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float | None = None
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    table_learning_rate: float = 0.05
    table_weight_decay: float = 0.0
    decay: DecayKind = "cosine"
    decay_every: int | None = None
    decay_factor: float = 0.1
    decay_floor: float = 0.0
    warmup_steps: int = 100
    backbone_share: float = 0.2
    frozen_share: float = 0.06
    expert_rate: float = 5.0
    stages: tuple[Stage, ...] | None = None
    init_optimizer: bool = True
    pipeline: Literal["base", "sparse_dist", "prefetch", "semi_sync"] = "sparse_dist"
    debug: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    log_every: int = 50
    evaluate_every: int | None = None
    early_stopping: Plateau | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train.{name} must be above 0, got {value}.")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"train.{name} must be a number of at least 0, got {value}.")
        for name in ("max_steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1 or null, got {value}.")
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError(
                "train.early_stopping is given, but train.evaluate_every is null, so that nothing "
                "is validated before the end. Give it the steps between two validations."
            )
        try:
            _ = self.rate_decay
        except ValueError as error:
            raise ValueError(f"train.{error}") from None

    @property
    def rate_decay(self) -> Decay:
        """How the rates fall over the run."""
        return Decay(
            kind=self.decay,
            every=self.decay_every,
            factor=self.decay_factor,
            floor=self.decay_floor,
        )
