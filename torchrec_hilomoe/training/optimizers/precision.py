"""Reduced precision: what computes in it, and the scale that keeps float16's gradients alive.

The dense part computes under autocast; parameters, tables and optimizer state stay float32. In
float16 small gradients would vanish, so the loss is multiplied by a scale. Dense gradients are
divided by it before the step, which is skipped where one is infinite. A table's optimizer is fused
into the backward pass and cannot wait for that verdict: its gradient is divided where it leaves the
dense part, and a rank whose gradient there is not finite hands its tables zeros.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast, Literal

import torch
from torch import Tensor

from torchrec_hilomoe.embeddings.features import SequenceFeatures
from torchrec_hilomoe.hilomoe.inject import set_auxiliary_loss_scale
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["DTYPES", "LossScale", "Precision", "use_precision"]

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: Mapping[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class LossScale:
    """PyTorch's dynamic scale, with a state in tensors.

    Args:
        device: Where gradients are.
        gradient_accumulation_steps: Micro-batches whose losses add up to a step's.
    """

    def __init__(self, device: torch.device, gradient_accumulation_steps: int = 1) -> None:
        self._scaler = torch.amp.GradScaler(device.type)
        self._scaler.scale(torch.zeros((), device=device))  # it makes its tensors when first asked
        self._gradient_accumulation_steps = gradient_accumulation_steps
        self._tensors = {
            "scale": torch.tensor(self._scaler.get_scale(), dtype=torch.float64),
            "since": torch.zeros((), dtype=torch.int64),
        }
        self._task: TrainTask | None = None

    def attach(self, task: TrainTask) -> None:
        """Multiply the task's losses, and unscale what reaches its tables."""
        self._task = task
        task.model.sparse.register_forward_hook(
            lambda _, args, features: _unscale_for_tables(cast(SequenceFeatures, features), task)
        )
        self._apply()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step if every gradient is finite; then adapt the scale."""
        self._scaler.step(optimizer)
        self._scaler.update()
        state = self._scaler.state_dict()
        self._tensors["scale"].fill_(state["scale"])
        self._tensors["since"].fill_(state["_growth_tracker"])
        self._apply()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scale, and the steps since it last changed; views, not copies."""
        return dict(self._tensors)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state_dict[name])
        state: dict[str, Any] = self._scaler.state_dict()
        state["scale"] = self._tensors["scale"].item()
        state["_growth_tracker"] = int(self._tensors["since"].item())
        self._scaler.load_state_dict(state)
        self._apply()

    def _apply(self) -> None:
        if self._task is not None:
            scale = self._tensors["scale"].item()
            self._task.loss_scale = scale
            set_auxiliary_loss_scale(self._task, scale / self._gradient_accumulation_steps)


def use_precision(task: TrainTask, precision: Precision, device: torch.device) -> None:
    """Let the dense part compute in ``precision``."""
    task.device_type, task.dtype = device.type, DTYPES[precision]


def _unscale_for_tables(features: SequenceFeatures, task: TrainTask) -> None:
    """Put hooks on what was looked up, so that its gradient is divided, or zero if not finite."""
    histories = [tensor for h in features.histories for tensor in (h.events, h.target)]
    for vectors in (features.sample, *histories):
        # TorchRec's pipelines trace the task with proxies, which have no gradient to hook.
        if isinstance(vectors, Tensor) and vectors.requires_grad:
            vectors.register_hook(partial(_divided, by=task.loss_scale))


def _divided(gradient: Tensor, by: float) -> Tensor:
    return torch.where(gradient.isfinite().all(), gradient / by, torch.zeros_like(gradient))
