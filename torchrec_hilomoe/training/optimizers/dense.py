"""Optimizers of what is no table, by name, with a state that exists from the start.

Adam and AdamW are one family: they keep the same moments and differ in how weights decay, so that
a stage may change from one to the other without starting afresh. Expert layers learn one by one,
though a site keeps them in one parameter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import nn, Tensor
from torch.distributed.tensor import DTensor
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper

from torchrec_hilomoe.hilomoe.linear import ROUTING
from torchrec_hilomoe.training.stages import OptimizerName, Stage

__all__ = ["DenseOptimizer", "ExpertLayers", "begin_state", "family_of", "local", "routes"]

FAMILIES: Mapping[OptimizerName, str] = {
    "adam": "adam",
    "adamw": "adam",
    "sgd": "sgd",
    "adagrad": "adagrad",
}


# What would move a parameter though its gradient is zero.
STILL = ("lr", "weight_decay")


def family_of(name: OptimizerName) -> str:
    """The optimizers that share a state share a family."""
    return FAMILIES[name]


@dataclass(frozen=True)
class DenseOptimizer:
    """One family of optimizers on some parameters.

    Attributes:
        keyed: Optimizer with its parameters by name, as TorchRec and checkpoints want it.
    """

    keyed: KeyedOptimizer

    @classmethod
    def build(
        cls, parameters: Mapping[str, Tensor], family: str, *, rate: float, momentum: float
    ) -> "DenseOptimizer":
        """Build it, with a state that says that no step was made.

        A checkpoint then always has the same keys, and none is dropped when it is loaded into a
        fresh process.

        Args:
            parameters: What it may change, by name.
            family: As :func:`family_of` names it.
            rate: The learning rate, until it is set.
            momentum: Of SGD.
        """
        keys = {id(tensor) for name, tensor in parameters.items() if routes(name)}
        keyed = KeyedOptimizerWrapper(
            dict(parameters), lambda tensors: _optimizer(tensors, keys, family, rate, momentum)
        )
        assert not begin_state(keyed), f"{family} has no state before its first step"
        return cls(keyed)

    def set_decay(self, name: OptimizerName, weight_decay: float) -> None:
        """Say how weights decay from now on; biases and norms never do."""
        for group in self._groups():
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
            if "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = name == "adamw"

    def set_rate(self, rate: float, key_lr_scale: float = 1.0) -> None:
        """Set the learning rate, and the factor on it for what routes."""
        for group in self._groups():
            group["lr"] = rate * key_lr_scale if group["routes"] else rate

    def gradients(self) -> Iterator[Tensor]:
        """Parameters that have a gradient now."""
        for parameter in self.keyed.params.values():
            if parameter.grad is not None:
                yield parameter

    def _groups(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self.keyed.param_groups)  # TorchRec: read-only


def begin_state(keyed: KeyedOptimizer) -> dict[str, dict[str, Any]]:
    """Make the state that says that no step was made.

    It is what a step without gradients leaves of an optimizer whose state begins at zero. Another
    one keeps nothing of it: its state then begins with its first step.

    Returns:
        Of such another one, what it did not keep, by the parameter's name.
    """
    groups = cast(list[dict[str, Any]], keyed.param_groups)
    before = {parameter: set(state) for parameter, state in keyed.state.items()}
    values = {parameter: parameter.detach().clone() for parameter in keyed.params.values()}
    still = [{name: group[name] for name in STILL if name in group} for group in groups]
    for group, kept in zip(groups, still, strict=True):
        group.update(dict.fromkeys(kept, 0.0))
    keyed.init_state()
    for group, kept in zip(groups, still, strict=True):
        group.update(kept)
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
            parameter.grad = None
    begun = True
    for parameter, state in keyed.state.items():
        for name, value in state.items():
            if name == "step":
                state[name] = torch.zeros_like(value) if isinstance(value, Tensor) else 0
            elif name not in before.get(parameter, ()) and isinstance(value, Tensor):
                begun = begun and not local(value).any()
    if begun:
        return {}
    held = dict(keyed.state)
    cast(dict, keyed.state).clear()
    return {name: held[parameter] for name, parameter in keyed.params.items() if parameter in held}


def _optimizer(
    tensors: list, keys: set[int], family: str, rate: float, momentum: float
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [
                tensor
                for tensor in tensors
                if ((tensor.dim() >= 2), id(tensor) in keys) == (decays, routing)
            ],
            "decays": decays,
            "routes": routing,
        }
        for decays, routing in product((True, False), repeat=2)
    ]
    groups = [group for group in groups if group["params"]]
    if family == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    if family == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=True)
    assert family == "adagrad"
    on_cpu = tensors[0].device.type == "cpu"  # elsewhere PyTorch has no fused Adagrad
    return torch.optim.Adagrad(groups, lr=rate, fused=on_cpu or None)


# One slice a layer, as design names them; the query projection belongs to all layers.
STACKED = ("expert_in", "expert_out", "expert_keys")


def routes(name: str) -> bool:
    """Whether an expert parameter, or the view of a layer of it, says which expert is chosen."""
    return not {*name.split(".")[-2:]}.isdisjoint(ROUTING)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which FSDP may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class _Slice:
    """One optimizer's share of an expert parameter: a layer of it, or all of it.

    Attributes:
        key: Its name.
        parameter: The whole.
        layer: Which layer, from 1; None is all.
        row: Where this rank has that layer.
    """

    key: str
    parameter: nn.Parameter
    layer: int | None = None
    row: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.layer is None else local(tensor)[self.row]


class ExpertLayers:
    """Views of the experts' parameters, one a layer, so that each layer learns on its own.

    A site stacks its layers in one parameter, which is fast. An optimizer, though, keeps one
    state a parameter: a layer that joins late would inherit the step count of the first, and a
    frozen one would drift on its momentum. Each view here is a parameter of its own to the
    optimizer, shares its memory with the stack, and is given a gradient only while it learns.

    Args:
        parameters: The experts' parameters by name, as
            :func:`torchrec_hilomoe.hilomoe.inject.expert_parameters` finds them.

    Attributes:
        views: Parameters that the optimizer is built on: ``NAME.LAYER`` (from 1) to a view, and
            parameters without layers under their own name.
        learning: Layers that learn now, counted from 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.learning: frozenset[int] = frozenset()
        # Of the stacks: of a sharded one a rank may hold some layers, or none.
        stacks = [p for name, p in parameters.items() if _is_stacked(name)]
        self._layers = max((stack.shape[0] for stack in stacks), default=0)
        self._slices = [piece for item in parameters.items() for piece in _slices(*item)]
        self.views: dict[str, Tensor] = {
            piece.key: piece.of(piece.parameter.detach()).requires_grad_() for piece in self._slices
        }

    def views_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The views that stand for an expert parameter; none for another one."""
        own = [piece.key for piece in self._slices if piece.parameter is parameter]
        return {key: self.views[key] for key in own}

    def learn(self, stage: Stage) -> None:
        """Let the layers of a stage learn.

        Raises:
            ValueError: If a parameter is in other memory than when the views of it were made.
        """
        for piece in self._slices:
            if (
                local(piece.of(piece.parameter)).data_ptr()
                != local(self.views[piece.key]).data_ptr()
            ):
                raise ValueError(
                    f"{piece.key} is in other memory than when its optimizer was built, which "
                    "would move it no more. Move the model (model.to, load_state_dict with "
                    "assign=True) before that, or build the optimizer anew."
                )
        active = self._layers if stage.active_layers is None else stage.active_layers
        chosen = range(1, active + 1) if stage.learning_layers is None else stage.learning_layers
        self.learning = frozenset(chosen)

    def give_gradients(self) -> None:
        """Hand each learning layer its slice of the gradient; before the step."""
        for piece in self._slices:
            learns = bool(self.learning) if piece.layer is None else piece.layer in self.learning
            gradient = piece.parameter.grad
            given = piece.of(gradient) if learns and gradient is not None else None
            self.views[piece.key].grad = given

    def drop_gradients(self) -> None:
        """Forget the gradients; after the step."""
        for piece in self._slices:
            piece.parameter.grad = None
            self.views[piece.key].grad = None


def _is_stacked(name: str) -> bool:
    return name.rpartition(".")[2] in STACKED


def _slices(name: str, parameter: nn.Parameter) -> list[_Slice]:
    if not _is_stacked(name):
        return [_Slice(name, parameter)]
    first = _first_layer(name, parameter)
    rows = range(local(parameter).shape[0])
    return [_Slice(f"{name}.{first + row}", parameter, first + row, row) for row in rows]


def _first_layer(name: str, parameter: nn.Parameter) -> int:
    """The first layer that this rank holds of a stack, from 1."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [at for at, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return 1
    if len(split) > 1 or not placements[split[0]].is_shard(0):
        raise ValueError(
            f"{name} is sharded as {placements}, but each layer of experts has an optimizer's "
            "state of its own. Shard it along dimension 0, as fully_shard does by itself."
        )
    ranks = mesh.size(split[0])
    return 1 + mesh.get_local_rank(split[0]) * -(-parameter.shape[0] // ranks)
