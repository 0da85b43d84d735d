"""``CTRBatch``: what the loader hands to the training pipeline.

Shape legend:
    B  rows of this rank's batch
    F  dense features
    T  events of one sequence group, all rows together
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

__all__ = ["CTRBatch", "Position"]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far training has read: independent of world size, workers and batch size.

    An epoch's rows, in that epoch's order, are cut into ``lanes`` contiguous lanes of equal
    length. A global batch takes the same number of rows from each, so one number is enough.

    Attributes:
        epoch: The epoch being read, from 0.
        lane_rows: Rows consumed from each lane of that epoch.
        lanes: Number of lanes.
        window_rows: Rows of each lane that are sorted by length together; 0 where none are. Inside
            a window, training resumes only with the same.
    """

    epoch: int
    lane_rows: int
    lanes: int
    window_rows: int = 0


@dataclass
class CTRBatch(Pipelineable):
    """A rank's share of one global batch, jagged to the model's door.

    Invariants: ``pooled`` and ``unpooled`` have ``Schema.pooled_keys`` and
    ``Schema.unpooled_keys`` as keys and stride ``B``; every candidate field has exactly one id
    a row; the fields of a sequence group have equal lengths. Rows that count nowhere (bad records,
    and those whose weight is 0) are not there, so ``B`` differs from rank to rank and from step to
    step, and may be 0: then the two jagged tensors, which TorchRec wants to have a row, have stride
    1 and no ids.

    Attributes:
        pooled: Ids for the pooled collection.
        unpooled: Ids for the sequence collection: candidate fields, then histories.
        dense: ``(B, F)`` float32.
        labels: ``(B,)`` float32, 0 or 1.
        weights: ``(B,)`` float32, above 0.
        groups: ``(B,)`` int64, the groups of GAUC.
        longest: The longest history in the batch, known on the host so that padding needs no
            device synchronisation; at least 1.
        mean_rows: Rows of the global batch divided by the world size: the loss's denominator,
            which makes the average over ranks the mean over the global batch. It is known before
            the rows are read, so those that turn out to count nowhere are among them.
        position: Where training resumes once this batch has been trained on.
        steps: Events of each row's longest history, summed over rows; known on the host, too.
        time: ``(B,)`` int64, when the candidate was shown, in seconds; None where the schema
            names no such column.
        times: ``(T,)`` int64 of each sequence group that has times, in the schema's order: when
            each event happened, parallel to the group's ids in ``unpooled``.
    """

    pooled: KeyedJaggedTensor
    unpooled: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    groups: Tensor
    longest: int
    mean_rows: float
    position: Position
    steps: int | None = None
    time: Tensor | None = None
    times: tuple[Tensor, ...] = ()

    def to(self, device: torch.device, non_blocking: bool = False) -> "CTRBatch":
        """Copy every tensor to ``device``."""
        return CTRBatch(
            pooled=self.pooled.to(device=device, non_blocking=non_blocking),
            unpooled=self.unpooled.to(device=device, non_blocking=non_blocking),
            dense=self.dense.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            groups=self.groups.to(device, non_blocking=non_blocking),
            longest=self.longest,
            mean_rows=self.mean_rows,
            position=self.position,
            steps=self.steps,
            time=None if self.time is None else self.time.to(device, non_blocking=non_blocking),
            times=tuple(times.to(device, non_blocking=non_blocking) for times in self.times),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until ``stream`` is done with it."""
        for jagged in (self.pooled, self.unpooled):
            # torchrec's own override names the CUDA class where its base class names any.
            jagged.record_stream(cast(torch.cuda.Stream, stream))
        plain = (self.dense, self.labels, self.weights, self.groups, *self.times)
        for tensor in plain if self.time is None else (*plain, self.time):
            tensor.record_stream(stream)

    def pin_memory(self) -> "CTRBatch":
        """Copy every tensor to page-locked memory."""
        return CTRBatch(
            pooled=self.pooled.pin_memory(),
            unpooled=self.unpooled.pin_memory(),
            dense=self.dense.pin_memory(),
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
            groups=self.groups.pin_memory(),
            longest=self.longest,
            mean_rows=self.mean_rows,
            position=self.position,
            steps=self.steps,
            time=None if self.time is None else self.time.pin_memory(),
            times=tuple(times.pin_memory() for times in self.times),
        )
