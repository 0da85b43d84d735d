"""Adam for everything dense, one learner an expert layer, rates by stage and step.

Tables have their optimizer fused into the backward pass; here it only gets its rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn, Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_hilomoe.hilomoe.sites import expert_parameters
from torchrec_hilomoe.training.stages import Stage, StageSpan

__all__ = ["ExpertLayers", "Learners", "decay_factor"]

# One slice a layer, as design names them; the query projection belongs to all layers.
STACKED = ("expert_in", "expert_out", "expert_keys")


@dataclass(frozen=True)
class _Slice:
    """One learner's share of an expert parameter: a layer of it, or all of it."""

    key: str
    parameter: nn.Parameter
    layer: int | None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.layer is None else tensor[self.layer - 1]


class ExpertLayers:
    """Views of the experts' parameters, one a layer, so that each layer learns on its own.

    A site stacks its layers in one parameter, which is fast. An optimizer, though, keeps one
    state a parameter: a layer that joins late would inherit the step count of the first, and a
    frozen one would drift on its momentum. Each view here is a parameter of its own to the
    optimizer, shares its memory with the stack, and is given a gradient only while it learns.

    Args:
        parameters: The experts' parameters by name, as
            :func:`torchrec_hilomoe.hilomoe.sites.expert_parameters` finds them.

    Attributes:
        views: What the optimizer is built on: ``NAME.LAYER`` (from 1) to a view, and
            parameters without layers under their own name.
        learning: Layers that learn now, counted from 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.learning: frozenset[int] = frozenset()
        self._slices = [piece for item in parameters.items() for piece in _slices(*item)]
        self.views: dict[str, Tensor] = {
            piece.key: piece.of(piece.parameter.detach()).requires_grad_() for piece in self._slices
        }

    def learn(self, stage: Stage) -> None:
        """Let the layers of a stage learn."""
        layers = {piece.layer for piece in self._slices if piece.layer is not None}
        active = len(layers) if stage.active_layers is None else stage.active_layers
        chosen = range(1, active + 1) if stage.learning_layers is None else stage.learning_layers
        self.learning = frozenset(chosen)

    def give_gradients(self, *_: Any) -> None:
        """Hand each learning layer its slice of the gradient; a hook before the step."""
        for piece in self._slices:
            learns = bool(self.learning) if piece.layer is None else piece.layer in self.learning
            gradient = piece.parameter.grad
            given = piece.of(gradient) if learns and gradient is not None else None
            self.views[piece.key].grad = given

    def drop_gradients(self, *_: Any) -> None:
        """Forget the gradients; a hook after the step."""
        for piece in self._slices:
            piece.parameter.grad = None
            self.views[piece.key].grad = None


def _slices(name: str, parameter: nn.Parameter) -> list[_Slice]:
    if name.rpartition(".")[2] not in STACKED:
        return [_Slice(name, parameter, None)]
    layers = range(1, parameter.shape[0] + 1)
    return [_Slice(f"{name}.{layer}", parameter, layer) for layer in layers]


class Learners:
    """Every optimizer of a run: fused ones of the tables, Adam of the backbone and of the experts.

    The state of each parameter exists from the start, so that a checkpoint always has the same
    keys and none is dropped when it is loaded into a fresh process.

    Args:
        model: The sharded model; its fused optimizers are found in it.
        learning_rate: Adam's rate.
        table_learning_rate: The fused optimizers' rate.

    Attributes:
        combined: All of them, as the pipeline wants it.
        rate: The backbone's rate now.
    """

    def __init__(
        self, model: DistributedModelParallel, learning_rate: float, table_learning_rate: float
    ) -> None:
        self.rate = learning_rate
        self._learning_rate = learning_rate
        self._table_learning_rate = table_learning_rate
        experts = expert_parameters(model.module)
        backbone = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if name not in experts
        }
        self._tables: KeyedOptimizer = model.fused_optimizer
        self._backbone = _keyed(backbone, _adam(backbone, learning_rate))
        optimizers = [("tables", self._tables), ("backbone", self._backbone)]
        self._layers = ExpertLayers(experts)
        self._experts: KeyedOptimizer | None = None
        if experts:
            adam = _adam(self._layers.views, learning_rate)
            self._experts = _keyed(self._layers.views, adam)
            # On Adam itself: TorchRec's wrapper accepts hooks and never calls them.
            adam.register_step_pre_hook(self._layers.give_gradients)
            adam.register_step_post_hook(self._layers.drop_gradients)
            optimizers.append(("experts", self._experts))
        self.combined = CombinedOptimizer(optimizers)

    def enter(self, stage: Stage) -> None:
        """Let the expert layers of a stage learn, and no other."""
        self._layers.learn(stage)
        self.combined.zero_grad()
        self._layers.drop_gradients()

    def set_rates(self, span: StageSpan, step: int, decay: float) -> None:
        """Set every learning rate for ``step``.

        Args:
            span: The stage that the step belongs to.
            step: Counted from 0 over the whole run.
            decay: The run's own factor at that step, see :func:`decay_factor`.
        """
        factor = decay * span.warmup(step)
        self.rate = self._learning_rate * span.stage.rate * factor
        _set(self._tables, self._table_learning_rate * span.stage.rate * factor)
        _set(self._backbone, self.rate)
        if self._experts is not None:
            _set(self._experts, self._learning_rate * span.stage.expert_rate * factor)


def decay_factor(kind: Literal["constant", "linear", "cosine"], progress: float) -> float:
    """Return the factor on every learning rate when ``progress`` of the run's steps are done.

    Example:
        >>> [round(decay_factor("cosine", share), 3) for share in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def _adam(parameters: Mapping[str, Tensor], learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(list(parameters.values()), lr=learning_rate, fused=True)


def _keyed(parameters: Mapping[str, Tensor], adam: torch.optim.Adam) -> KeyedOptimizerWrapper:
    """Adam by name, whose state exists but says that no step was made."""
    optimizer = KeyedOptimizerWrapper(dict(parameters), lambda _: adam)
    optimizer.init_state()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def _set(optimizer: KeyedOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate  # type: ignore[index]  # TorchRec types its groups as read-only
