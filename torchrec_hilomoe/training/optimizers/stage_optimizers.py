"""What the optimizers of a run are to whoever drives its stages, and what steps in one stage.

Tables have their optimizer fused into the backward pass; a step only gives it its rate.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, OptimizerWrapper

from torchrec_hilomoe.training.optimizers.dense import DenseOptimizer, ExpertLayers
from torchrec_hilomoe.training.optimizers.precision import LossScale
from torchrec_hilomoe.training.stages import Stage, StageSpan

__all__ = ["StageOptimizer", "StageOptimizers", "groups_of", "load_states", "states_of"]


class StageOptimizers(ABC):
    """Every optimizer of a run, under the stage of the hour.

    Attributes:
        stage_optimizer: What steps in the stage that was entered last, as a pipeline wants it.
    """

    stage_optimizer: "StageOptimizer"

    @abstractmethod
    def enter(self, stage: Stage) -> None:
        """Let the tables, the backbone and the expert layers of a stage learn, and nothing else."""

    @abstractmethod
    def set_rates(self, span: StageSpan, step: int, decay: float) -> None:
        """Set every learning rate for ``step``.

        Args:
            span: The stage that the step belongs to.
            step: Counted from 0 over the whole run.
            decay: The factor of the run, or of the stage, at that step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Every tensor that training changes beside the model: views, not copies."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""


def states_of(optimizer: CombinedOptimizer) -> dict[str, Any]:
    """The state of each parameter, by the optimizer's name and its own: views, not copies."""
    # One by one: of optimizers that share a parameter, TorchRec's union has only one's state.
    return {
        f"{name}.{key}": tensors
        for name, part in optimizer.optimizers
        for key, tensors in part.state_dict()["state"].items()
    }


def load_states(optimizer: CombinedOptimizer, states: Mapping[str, Any]) -> None:
    """Take over what :func:`states_of` gave."""
    for name, part in optimizer.optimizers:
        own = {
            key.removeprefix(f"{name}."): tensors
            for key, tensors in states.items()
            if key.startswith(f"{name}.")
        }
        part.load_state_dict({"state": own})


def groups_of(optimizer: KeyedOptimizer) -> list[dict[str, Any]]:
    """The parameter groups, to be changed; fused optimizers take them over when they step."""
    return cast(list[dict[str, Any]], optimizer.param_groups)  # TorchRec types them as read-only


class StageOptimizer(OptimizerWrapper):
    """What a pipeline steps in one stage; TorchRec's base for optimizers that do more than step.

    Args:
        tables: The fused optimizers: a step is done by the backward pass, this one sets rates.
        layers: The expert layers, which get their gradients here.
        dense: What learns beside the tables.
        max_grad_norm: Largest norm of all its gradients, as one vector.
        loss_scale: By which the loss was multiplied.

    Attributes:
        frozen: Parameters whose gradients no step may see; where a wrapper cannot be made anew, as
            FSDP's, frozen parameters have some.
        gradient_norm: Norm of the dense gradients of the last step, before clipping; None if
            nothing clips.
    """

    def __init__(
        self,
        tables: KeyedOptimizer,
        layers: ExpertLayers,
        dense: Sequence[DenseOptimizer],
        *,
        max_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        keyed = [(str(index), optimizer.keyed) for index, optimizer in enumerate(dense)]
        super().__init__(CombinedOptimizer([("tables", tables), *keyed]))
        self.frozen: Sequence[torch.Tensor] = ()
        self.gradient_norm: torch.Tensor | None = None
        self._tables = tables
        self._layers = layers
        self._dense = dense
        self._together = CombinedOptimizer(list(keyed))
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the gradients, those of the experts' stacks among them."""
        super().zero_grad(set_to_none)
        self._layers.drop_gradients()

    def collect_gradients(self) -> None:
        """Give each expert layer that learns its slice of the gradient, and frozen ones none.

        A step does it. Call it before what reads gradients through this optimizer between backward
        and step, such as ``GradScaler.unscale_``.
        """
        self._layers.give_gradients()
        for parameter in self.frozen:
            parameter.grad = None

    def step(self, closure: Any = None) -> None:
        """Unscale, clip, step, and forget the experts' gradients."""
        self.collect_gradients()
        self.gradient_norm = None
        held = [parameter for optimizer in self._dense for parameter in optimizer.gradients()]
        scale = self._loss_scale if held else None
        if scale is not None:
            scale.unscale(self._together)
        if self._max_grad_norm is not None and held:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(held, self._max_grad_norm)
        if scale is not None:
            scale.step(self._together)
        else:
            self._together.step()
        self._tables.step()
        self._layers.drop_gradients()
