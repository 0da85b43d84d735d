"""Optimizers of what is no table, by name, with a state that exists from the start.

Adam and AdamW are one family: they keep the same moments and differ in how weights decay, so that
a stage may change from one to the other without starting afresh.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper

from torchrec_hilomoe.training.stages import OptimizerName

__all__ = ["DenseOptimizer", "family_of"]

FAMILIES: Mapping[OptimizerName, str] = {
    "adam": "adam",
    "adamw": "adam",
    "sgd": "sgd",
    "adagrad": "adagrad",
}


def family_of(name: OptimizerName) -> str:
    """The optimizers that share a state share a family."""
    return FAMILIES[name]


@dataclass(frozen=True)
class DenseOptimizer:
    """One family of optimizers on some parameters.

    Attributes:
        keyed: By name, as TorchRec and checkpoints want it.
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
        keyed = KeyedOptimizerWrapper(
            dict(parameters), lambda tensors: _optimizer(tensors, family, rate, momentum)
        )
        keyed.init_state()
        keyed.zero_grad()
        for state in keyed.state.values():
            if "step" in state:
                state["step"].zero_()
        return cls(keyed)

    def set_decay(self, name: OptimizerName, weight_decay: float) -> None:
        """Say how weights decay from now on; biases and norms never do."""
        for group in self._groups():
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
            if "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = name == "adamw"

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self._groups():
            group["lr"] = rate

    def gradients(self) -> Iterator[Tensor]:
        """Parameters that have a gradient now."""
        for parameter in self.keyed.params.values():
            if parameter.grad is not None:
                yield parameter

    def _groups(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self.keyed.param_groups)  # TorchRec: read-only


def _optimizer(tensors: list, family: str, rate: float, momentum: float) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [tensor for tensor in tensors if (tensor.dim() >= 2) == decays],
            "decays": decays,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if family == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    if family == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=True)
    assert family == "adagrad"
    on_cpu = tensors[0].device.type == "cpu"  # elsewhere PyTorch has no fused Adagrad
    return torch.optim.Adagrad(groups, lr=rate, fused=on_cpu or None)
