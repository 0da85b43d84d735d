"""Who learns, and how fast: fused optimizers of the tables, one of the backbone, one of experts.

Tables have their optimizer fused into the backward pass; here it only gets its rate. The others
step together, after their gradients were unscaled and clipped as one vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, OptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_hilomoe.hilomoe.sites import expert_parameters
from torchrec_hilomoe.training.optimizers.dense import DenseOptimizer, family_of
from torchrec_hilomoe.training.optimizers.expert_layers import ExpertLayers
from torchrec_hilomoe.training.optimizers.precision import LossScale
from torchrec_hilomoe.training.stages import OptimizerName, Stage, StageSpan

__all__ = ["LearnerOptions", "Learners", "StageOptimizer"]


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """How everything learns.

    Attributes:
        learning_rate: Of backbone and, with a factor of their own, experts.
        table_learning_rate: Of the optimizers that are fused into the tables.
        optimizer: Of backbone and experts, where a stage does not name one.
        others: Those that stages name: their state exists from the start.
        weight_decay: Of dense matrices, where a stage does not say it.
        momentum: Of SGD.
        clip_norm: The longest that all dense gradients may be, as one vector; None is any length.
    """

    learning_rate: float = 1e-3
    table_learning_rate: float = 0.05
    optimizer: OptimizerName = "adam"
    others: Sequence[OptimizerName] = ()
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip_norm: float | None = None


class Learners:
    """Every optimizer of a run.

    The state of each parameter exists from the start, so that a checkpoint always has the same
    keys and none is dropped when it is loaded into a fresh process.

    Args:
        model: The sharded model; its fused optimizers are found in it.
        options: How everything learns.
        loss_scale: Of a run in float16.

    Attributes:
        combined: All of them.
        stepping: Those of the stage that was entered last, as a pipeline wants them.
        rate: The backbone's rate now.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        options: LearnerOptions,
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
        self._backbones: dict[str, DenseOptimizer] = {}
        self._experts: dict[str, DenseOptimizer] = {}
        optimizers: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = []
        optimizers.append(("tables", self._tables))
        own = family_of(options.optimizer)
        for family in dict.fromkeys([own, *map(family_of, options.others)]):
            suffix = "" if family == own else f"_{family}"
            for kind, parameters, built in (
                ("backbone", backbone, self._backbones),
                ("experts", self._layers.views, self._experts),
            ):
                if parameters:
                    built[family] = DenseOptimizer.build(
                        parameters,
                        family,
                        rate=options.learning_rate,
                        momentum=options.momentum,
                    )
                    optimizers.append((f"{kind}{suffix}", built[family].keyed))
        self.combined = CombinedOptimizer(optimizers)
        self._family = own
        self.stepping = StageOptimizer(self._tables, self._layers, self._dense())

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
        self.stepping = StageOptimizer(
            self._tables,
            self._layers,
            [built[self._family] for built in learning if built],
            clip_norm=self._options.clip_norm,
            loss_scale=self._loss_scale,
        )

    def state(self) -> Mapping[str, Any]:
        """Every tensor that training changes beside the model: views, not copies."""
        # One by one: of optimizers that share a parameter, TorchRec's union has only one's state.
        state = {
            f"{name}.{key}": tensors
            for name, optimizer in self.combined.optimizers
            for key, tensors in optimizer.state_dict()["state"].items()
        }
        scale = {} if self._loss_scale is None else {"loss_scale": self._loss_scale.tensors}
        return {"optimizer": {"state": state}, **scale}

    def restored(self) -> None:
        """Take over what a checkpoint has filled :meth:`state` with."""
        if self._loss_scale is not None:
            self._loss_scale.restored()

    def set_rates(self, span: StageSpan, step: int, decay: float) -> None:
        """Set every learning rate for ``step``.

        Args:
            span: The stage that the step belongs to.
            step: Counted from 0 over the whole run.
            decay: The factor of the run, or of the stage, at that step.
        """
        options, factor = self._options, decay * span.warmup(step)
        self.rate = options.learning_rate * span.stage.rate * factor
        for group in self._tables.param_groups:
            rate = options.table_learning_rate * span.stage.rate * factor
            cast(dict[str, Any], group)["lr"] = rate  # TorchRec types its groups as read-only
        if self._backbones:
            self._backbones[self._family].set_rate(self.rate)
        if self._experts:
            expert_rate = options.learning_rate * span.stage.expert_rate * factor
            self._experts[self._family].set_rate(expert_rate)

    def _dense(self) -> list[DenseOptimizer]:
        return [built[self._family] for built in (self._backbones, self._experts) if built]


class StageOptimizer(OptimizerWrapper):
    """What a pipeline steps in one stage; TorchRec's base for optimizers that do more than step.

    Args:
        tables: The fused optimizers: a step is done by the backward pass, this one sets rates.
        layers: The expert layers, which get their gradients here.
        dense: What learns beside the tables.
        clip_norm: The longest that all its gradients may be, as one vector.
        loss_scale: By which the loss was multiplied.

    Attributes:
        gradient_norm: Of the last step, before it was clipped; None if nothing clips.
    """

    def __init__(
        self,
        tables: KeyedOptimizer,
        layers: ExpertLayers,
        dense: Sequence[DenseOptimizer],
        *,
        clip_norm: float | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        keyed = [(str(index), optimizer.keyed) for index, optimizer in enumerate(dense)]
        super().__init__(CombinedOptimizer([("tables", tables), *keyed]))
        self.gradient_norm: torch.Tensor | None = None
        self._tables = tables
        self._layers = layers
        self._dense = dense
        self._together = CombinedOptimizer(list(keyed))
        self._clip_norm = clip_norm
        self._loss_scale = loss_scale

    def step(self, closure: Any = None) -> None:
        """Unscale, clip, step, and forget the experts' gradients."""
        self._layers.give_gradients()
        held = [parameter for optimizer in self._dense for parameter in optimizer.gradients()]
        scale = self._loss_scale if held else None
        if scale is not None:
            scale.unscale(self._together)
        if self._clip_norm is not None and held:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(held, self._clip_norm)
        if scale is not None:
            scale.step(self._together)
        else:
            self._together.step()
        self._tables.step()
        self._layers.drop_gradients()
