"""``CTRBatch``: what the loader hands to the training pipeline.

Shape legend:
    B  rows of this rank's batch
    F  dense features
    T  events of one sequence group, all rows together
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

__all__ = ["CTRBatch", "LoaderState"]


TENSORS = (Tensor, KeyedJaggedTensor)


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """How far training has read: independent of world size, workers and batch size.

    An epoch's rows, in that epoch's order, are cut into ``num_canonical_shards`` contiguous
    shards of equal length. A global batch takes the same number of rows from each, so one number is
    enough.

    Attributes:
        epoch: The epoch being read, from 0.
        lane_rows: Rows consumed from each shard of that epoch.
        num_canonical_shards: Number of shards.
        window_rows: Rows of each shard that are sorted by length together; 0 where none are. Inside
            a window, training resumes only with the same.
    """

    epoch: int
    lane_rows: int
    num_canonical_shards: int
    window_rows: int = 0

    @classmethod
    def renewed(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint says, even one of the last release, in the names of today.

        Example:
            >>> LoaderState.renewed({"epoch": 0, "lane_rows": 3, "lanes": 8})
            {'epoch': 0, 'lane_rows': 3, 'num_canonical_shards': 8}
        """
        return {"num_canonical_shards" if it == "lanes" else it: raw[it] for it in raw}


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
        grouping_keys: ``(B,)`` int64, the groups of GAUC.
        max_seqlen: The longest history in the batch, known on the host so that padding needs no
            device synchronisation; at least 1.
        loss_denominator: Rows of the global batch divided by the world size, which makes the
            average over ranks the mean over the global batch. It is known before the rows are
            read, so those that turn out to count nowhere are among them.
        position: Where training resumes once this batch has been trained on.
        num_tokens: Events of each row's longest history, summed over rows; known on the host, too.
        time: ``(B,)`` int64, when the candidate was shown, in seconds; None where the schema
            names no such column.
        times: ``(T,)`` int64 of each sequence group that has times, in the schema's order: when
            each event happened, parallel to the group's ids in ``unpooled``.
        teacher_logits: ``(B,)`` float32, logits of a model that this one learns from; None where
            there is no such.
    """

    pooled: KeyedJaggedTensor
    unpooled: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    grouping_keys: Tensor
    max_seqlen: int
    loss_denominator: float
    position: LoaderState
    num_tokens: int | None = None
    time: Tensor | None = None
    times: tuple[Tensor, ...] = ()
    teacher_logits: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "CTRBatch":
        """Copy every tensor to ``device``."""
        return self._mapped(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until ``stream`` is done with it."""
        for tensor in self._tensors():
            # torchrec's own override names the CUDA class where its base class names any.
            tensor.record_stream(cast(torch.cuda.Stream, stream))

    def pin_memory(self) -> "CTRBatch":
        """Copy every tensor to page-locked memory."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _tensors(self) -> Iterator[Tensor | KeyedJaggedTensor]:
        for field in fields(self):
            value = getattr(self, field.name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, TENSORS):
                    yield tensor

    def _mapped(self, change: Callable[[Any], Any]) -> "CTRBatch":
        """Return the same batch with every tensor changed."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TENSORS):
                changed[field.name] = change(value)
            elif isinstance(value, tuple):
                changed[field.name] = tuple(map(change, value))
        return replace(self, **changed)
