"""How a model learns."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torchrec_hilomoe.config.stage import Decay, OptimizerName, PlateauConfig, Stage

__all__ = ["TrainConfig"]

AT_LEAST_ONE = ("batch_size", "log_every", "epochs", "gradient_accumulation_steps")
ABOVE_ZERO = ("learning_rate", "table_learning_rate", "max_grad_norm", "teacher_temperature")
NOT_NEGATIVE = (
    *("weight_decay", "table_weight_decay", "momentum", "warmup_steps"),
    *("expert_lr_scale", "key_lr_scale"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model learns.

    Attributes:
        max_steps: Length of the run, in optimizer steps; null trains ``epochs`` epochs.
        epochs: Length of the run, in passes over the training split, when ``max_steps`` is null.
        batch_size: Rows of a global batch, over all ranks and micro-batches.
        gradient_accumulation_steps: Number of micro-batches into which each rank splits its share
            of a batch, to need less memory: dense gradients are added up before the step. Tables
            take a step after each micro-batch, because theirs is fused into the backward pass.
        learning_rate: Learning rate of everything that is not a table.
        optimizer: Optimizer of everything that is not a table: ``adam``, ``adamw``, ``sgd`` or
            ``adagrad``.
        weight_decay: Weight decay of the dense matrices; biases and norms do not decay. L2 on the
            gradient, except with ``adamw``, which decays by itself.
        momentum: Momentum of ``sgd``.
        max_grad_norm: Largest norm of all dense gradients together, as one vector over all
            data-parallel parameters; null does not clip. Tables are not part of it: their
            optimizer is fused into the backward pass, before the norm is known.
        table_optimizer: Optimizer of the tables, fused into their backward pass.
        table_learning_rate: Learning rate of the tables.
        table_weight_decay: L2 decay of the rows that a batch looks up, once for each step that
            looks them up; GPUs only. Rows that no batch looks up do not decay, unlike with L2 on
            whole tables.
        decay: Decay of the learning rates over the run.
        warmup_steps: Number of steps of linear warm-up in the first stage; expert stages take a
            tenth.
        backbone_share: Share of the run's steps in stage ``backbone_warmup``.
        frozen_share: Share of the run's steps in all stages ``expert_warmup`` together.
        expert_lr_scale: Factor on ``learning_rate`` for experts.
        key_lr_scale: Factor on the experts' learning rate for the keys, and the projection of the
            query, that route; tied keys (``tie_keys``) learn as the down-vectors that they are.
        stages: Schedule of stages; replaces ``warmup_steps``, ``backbone_share``,
            ``frozen_share``, ``expert_lr_scale`` and ``key_lr_scale``.
        init_optimizer: Whether ``init_from`` takes over optimizer states too.
        pipeline: Kind of pipeline: ``base`` copies ahead, ``sparse_dist`` exchanges ids ahead
            too; on GPUs also ``prefetch``, which fills the caches of tables in host memory ahead,
            and ``semi_sync``, which looks up one step early, in tables that are one step old.
            ``auto`` is ``base`` for one rank, which has nobody to exchange ids with, and
            ``sparse_dist`` for several.
        debug: Whether to train without a pipeline: the same steps, one after the other.
        precision: Number format of the dense part's computation: ``fp32``, or ``bf16`` or ``fp16``
            under autocast. Parameters, tables and optimizer states stay float32.
        compile: Whether the dense part goes through ``torch.compile``.
        log_every: Number of steps between two lines of training metrics.
        evaluate_every: Number of steps between two validations; null validates at the end only.
        early_stopping: Condition that ends the run when a validation metric no longer improves in
            its last stage; null trains to the end.
        teacher: Folder of an exported model whose predictions are learned besides the clicks;
            null learns from clicks alone.
        teacher_weight: Share of the teacher's predictions in the loss, from 0 to 1; clicks have the
            rest.
        teacher_temperature: Divisor of the teacher's and the model's logits where they are
            compared; that part of the loss is multiplied by its square.
        device: Device of the ranks: ``cpu``, ``cuda``, or ``auto``, a GPU when there is one.
    """

    max_steps: int | None = None
    epochs: int = 1
    batch_size: int = 1024
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    table_learning_rate: float = 0.05
    table_weight_decay: float = 0.0
    decay: Decay = field(default_factory=lambda: Decay(kind="cosine"))
    warmup_steps: int = 100
    backbone_share: float = 0.2
    frozen_share: float = 0.06
    expert_lr_scale: float = 5.0
    key_lr_scale: float = 1.0
    stages: tuple[Stage, ...] | None = None
    init_optimizer: bool = True
    pipeline: Literal["auto", "base", "sparse_dist", "prefetch", "semi_sync"] = "auto"
    debug: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    log_every: int = 50
    evaluate_every: int | None = None
    early_stopping: PlateauConfig | None = None
    teacher: str | None = None
    teacher_weight: float = 0.5
    teacher_temperature: float = 1.0
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
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(
                f"train.teacher_weight must be from 0 to 1, got {self.teacher_weight}."
            )
        for name in ("max_steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1 or null, got {value}.")
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError(
                "train.early_stopping is given, but train.evaluate_every is null, so that nothing "
                "is validated before the end. Give it the steps between two validations."
            )
