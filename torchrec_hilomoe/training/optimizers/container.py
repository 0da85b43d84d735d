"""Who learns, and how fast: fused optimizers of the tables, one of the backbone, one of experts.

Tables have their optimizer fused into the backward pass; here it only gets its rate. The others
step together, after their gradients were unscaled and clipped as one vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.training.optimizers.dense import DenseOptimizer, ExpertLayers, family_of
from torchrec_hilomoe.training.optimizers.precision import LossScale
from torchrec_hilomoe.training.optimizers.stage_optimizers import (
    groups_of,
    load_states,
    StageOptimizer,
    StageOptimizers,
    states_of,
)
from torchrec_hilomoe.training.stages import OptimizerName, Stage, StageSpan

__all__ = ["OptimizerOptions", "OptimizersContainer"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How everything learns.

    Attributes:
        learning_rate: Learning rate of the backbone and, times a factor of their own, of experts.
        table_learning_rate: Learning rate of the optimizers that are fused into the tables.
        optimizer: Name of the optimizer of backbone and experts, where a stage does not name one.
        others: Names of the optimizers that stages name; their state exists from the start.
        weight_decay: Weight decay of dense matrices, where a stage has none of its own.
        momentum: Momentum of SGD.
        max_grad_norm: Largest norm of all dense gradients, as one vector; None does not clip.
    """

    learning_rate: float = 1e-3
    table_learning_rate: float = 0.05
    optimizer: OptimizerName = "adam"
    others: Sequence[OptimizerName] = ()
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None


class OptimizersContainer(StageOptimizers):
    """Every optimizer of a run.

    The state of each parameter exists from the start, so that a checkpoint always has the same
    keys and none is dropped when it is loaded into a fresh process.

    Args:
        model: The sharded model; its fused optimizers are found in it.
        options: How everything learns.
        loss_scale: Of a run in float16.

    Attributes:
        combined: All optimizers as one.
        stage_optimizer: Optimizers of the stage that was entered last, as a pipeline wants them.
        rate: Learning rate of the backbone at this step.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        options: OptimizerOptions,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.rate = options.learning_rate
        self._options = options
        self._loss_scale = loss_scale
        experts = expert_parameters(model.module)
        backbone = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if name not in experts
        }
        self._tables: KeyedOptimizer = model.fused_optimizer
        self._layers = ExpertLayers(experts)
        self._family = family_of(options.optimizer)
        self._backbones = self._build(backbone)
        self._experts = self._build(self._layers.views)
        self.combined = self._combine()
        self.stage_optimizer = StageOptimizer(self._tables, self._layers, self._dense())

    @property
    def gradient_norm(self) -> torch.Tensor | None:
        """Norm of the last step's dense gradients, before clipping.

        None where nothing clips, and in float16, which skips a step whose norm is infinite.
        """
        return self.stage_optimizer.gradient_norm if self._loss_scale is None else None

    def add_experts(self, model: nn.Module) -> None:
        """Take in experts that a model has only now been given, before a stage is entered.

        Raises:
            ValueError: If it had some before.
        """
        if self._experts:
            raise ValueError(
                "OptimizersContainer.add_experts: the model had experts before, whose optimizer "
                "would be forgotten. Build another container."
            )
        self._layers = ExpertLayers(expert_parameters(model))
        self._experts = self._build(self._layers.views)
        self.combined = self._combine()

    def drop_experts(self) -> None:
        """Forget experts that a model has lost, before a stage is entered."""
        self._layers, self._experts = ExpertLayers({}), {}
        self.combined = self._combine()

    def enter(self, stage: Stage) -> None:
        """Let the tables, the backbone and the expert layers of a stage learn, and nothing else."""
        self._layers.learn(stage)
        self.combined.zero_grad()
        self._layers.drop_gradients()
        name = stage.optimizer or self._options.optimizer
        own_decay = stage.weight_decay
        weight_decay = self._options.weight_decay if own_decay is None else own_decay
        self._family = family_of(name)
        for optimizer in self._dense():
            optimizer.set_decay(name, weight_decay)
        learning = [self._backbones] * stage.train_backbone + [self._experts] * stage.experts_learn
        self.stage_optimizer = StageOptimizer(
            self._tables,
            self._layers,
            [built[self._family] for built in learning if built],
            max_grad_norm=self._options.max_grad_norm,
            loss_scale=self._loss_scale,
        )

    def state_dict(self) -> dict[str, Any]:
        """Every tensor that training changes beside the model: views, not copies."""
        scale = {} if self._loss_scale is None else {"loss_scale": self._loss_scale.state_dict()}
        return {"optimizer": {"state": states_of(self.combined)}, **scale}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, be it its own tensors, filled by a checkpoint."""
        load_states(self.combined, state_dict["optimizer"]["state"])
        if self._loss_scale is not None:
            self._loss_scale.load_state_dict(state_dict["loss_scale"])

    def set_rates(self, span: StageSpan, step: int, decay: float) -> None:
        """Set every learning rate for ``step``.

        Args:
            span: The stage that the step belongs to.
            step: Counted from 0 over the whole run.
            decay: The factor of the run, or of the stage, at that step.
        """
        options, factor = self._options, decay * span.warmup(step)
        self.rate = options.learning_rate * span.stage.lr_scale * factor
        for group in groups_of(self._tables):
            group["lr"] = options.table_learning_rate * span.stage.lr_scale * factor
        if self._backbones:
            self._backbones[self._family].set_rate(self.rate)
        if self._experts:
            expert_lr_scale = options.learning_rate * span.stage.expert_lr_scale * factor
            self._experts[self._family].set_rate(expert_lr_scale, span.stage.key_lr_scale)

    def _build(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, DenseOptimizer]:
        """One optimizer of each family that a stage may ask for."""
        options = self._options
        own, others = family_of(options.optimizer), map(family_of, options.others)
        return {
            family: DenseOptimizer.build(
                parameters, family, rate=options.learning_rate, momentum=options.momentum
            )
            for family in (dict.fromkeys([own, *others]) if parameters else ())
        }

    def _combine(self) -> CombinedOptimizer:
        optimizers: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = []
        optimizers.append(("tables", self._tables))
        own = family_of(self._options.optimizer)
        for kind, built in (("backbone", self._backbones), ("experts", self._experts)):
            for family, optimizer in built.items():
                suffix = "" if family == own else f"_{family}"
                optimizers.append((f"{kind}{suffix}", optimizer.keyed))
        return CombinedOptimizer(optimizers)

    def _dense(self) -> list[DenseOptimizer]:
        return [built[self._family] for built in (self._backbones, self._experts) if built]
