"""Bytes that autograd keeps between a forward pass and its backward pass, counted without numbers.

The dense part runs on tensors that have shapes and no contents, and whatever it saves for its
backward pass is added up, each storage once. Histories are full, as in the count of FLOPs. What
kernels allocate for a moment is not seen.

Shape legend:
    B  rows
    T  events of all rows together
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures

__all__ = ["Activations", "full_features", "saved_activations", "saved_bytes"]

FEW, MORE = 128, 256  # two batches, which a line goes through


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the dense part saves, as a line.

    Attributes:
        fixed: Bytes that a batch of any size saves.
        per_row: Bytes per row.
    """

    fixed: int
    per_row: int

    def bytes(self, rows: int) -> int:
        """Of a batch."""
        return self.fixed + rows * self.per_row


def saved_activations(
    backbone: Backbone, widths: FeatureWidths, dtype: torch.dtype | None
) -> Activations:
    """Count what a training step saves.

    Args:
        backbone: The dense part; not changed.
        widths: Of its input.
        dtype: What it computes in under autocast; None is its parameters'.
    """
    few, more = (saved_bytes(backbone, widths, rows, dtype) for rows in (FEW, MORE))
    per_row = -(-(more - few) // (MORE - FEW))
    return Activations(fixed=max(0, more - MORE * per_row), per_row=per_row)


def saved_bytes(
    backbone: Backbone, widths: FeatureWidths, rows: int, dtype: torch.dtype | None
) -> int:
    """Bytes that one forward pass saves, beside parameters and buffers."""
    training = backbone.training
    backbone.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    owned = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in owned.items()}
    resident = {_storage(tensor) for tensor in state.values()}
    saved: dict[int, Tensor] = {}  # the tensors too, so that no storage's number is given out twice

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in resident:
            saved[_storage(tensor)] = tensor
        return tensor

    with (
        # FBGEMM computes shapes with a function that PyTorch deprecates.
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        mode,
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        functional_call(backbone, state, (full_features(widths, rows),))
    backbone.train(training)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def full_features(widths: FeatureWidths, rows: int) -> SequenceFeatures:
    """A batch of full histories, as the lookups give it: its vectors want gradients."""
    moments_B = torch.zeros(rows, dtype=torch.int64)
    histories = tuple(
        History(
            events=torch.zeros(rows * history.max_length, history.event, requires_grad=True),
            lengths=torch.full((rows,), history.max_length),
            target=torch.zeros(rows, history.event, requires_grad=True),
            times=moments_B.repeat_interleave(history.max_length) if history.timed else None,
        )
        for history in widths.histories
    )
    max_seqlen = max((history.max_length for history in widths.histories), default=1)
    return SequenceFeatures(
        candidate=torch.zeros(rows, widths.candidate, requires_grad=True),
        context=torch.zeros(rows, widths.context, requires_grad=True),
        histories=histories,
        max_seqlen=max_seqlen,
        time=moments_B if widths.timed else None,
        num_tokens=rows * max_seqlen,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
