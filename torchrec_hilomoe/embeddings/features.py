"""``ModelInputs``, which the ranker reads, and ``SequenceFeatures``, which backbones receive.

Shape legend:
    B  rows
    T  events of all rows together, without padding
    C  candidate width (fields x embedding)
    W  width of one event (fields x embedding)
    P  context width (pooled vectors and dense features)
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch

__all__ = ["FeatureWidths", "History", "HistoryWidths", "ModelInputs", "SequenceFeatures"]


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What of a batch the ranker reads: jagged ids and dense features, no labels.

    Attributes:
        pooled: Ids of ``Schema.pooled_keys``.
        unpooled: Ids of ``Schema.unpooled_keys``.
        dense: ``(B, F)``, F dense features.
        max_seqlen: Length of the longest history in the batch, at least 1.
        num_tokens: Events of each row's longest history, summed over rows; None where the host does
            not know.
        rows: ``B``, where it may be 0: the jagged tensors of such a batch have stride 1. None takes
            every row that they have.
        time: ``(B,)`` int64, when the candidate was shown, in seconds; needed if the schema has
            such a column.
        times: ``(T,)`` int64 for each group of ``Schema.event_times``, when each event happened;
            needed if there are any.
    """

    pooled: KeyedJaggedTensor
    unpooled: KeyedJaggedTensor
    dense: Tensor
    max_seqlen: int
    num_tokens: int | None = None
    rows: int | None = None
    time: Tensor | None = None
    times: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, batch: CTRBatch) -> Self:
        """Take them from a batch."""
        return cls(
            pooled=batch.pooled,
            unpooled=batch.unpooled,
            dense=batch.dense,
            max_seqlen=batch.max_seqlen,
            num_tokens=batch.num_tokens,
            rows=batch.labels.shape[0],
            time=batch.time,
            times=batch.times,
        )


@dataclass(frozen=True)
class History:
    """One behaviour sequence of each row, jagged; or one of all rows.

    Attributes:
        events: ``(T, W)``, row after row, oldest event first.
        lengths: ``(B,)`` int64, events of each row; ``(1,)`` if they are shared.
        target: ``(B, W)``, the candidate in the layout of an event: the fields that share a
            table stand in the same place, and a field that only events have is zero.
        times: ``(T,)`` int64, when each event happened, in seconds; None where the data do not say.
        shared: Whether every row has these events, those of one user with many candidates.
    """

    events: Tensor
    lengths: Tensor
    target: Tensor
    times: Tensor | None = None
    shared: bool = False


@dataclass(frozen=True)
class SequenceFeatures:
    """Vectors of a batch: plain tensors, so that a backbone knows nothing of tables.

    Attributes:
        candidate: ``(B, C)``.
        context: ``(B, P)``.
        histories: One for each sequence group of the schema.
        max_seqlen: Length of the longest history in the batch, at least 1.
        time: ``(B,)`` int64, when the candidate was shown, in seconds; None where the data do not
            say.
        num_tokens: Events of each row's longest history, summed over rows; None where the host does
            not know.
        joined: ``(B, C + P)``, of which candidate and context are parts, where they are.
    """

    candidate: Tensor
    context: Tensor
    histories: tuple[History, ...]
    max_seqlen: int
    time: Tensor | None = None
    num_tokens: int | None = None
    joined: Tensor | None = None

    @property
    def sample(self) -> Tensor:
        """Candidate and context side by side, ``(B, C + P)``."""
        if self.joined is not None:
            return self.joined
        return torch.cat([self.candidate, self.context], dim=1)


@dataclass(frozen=True, kw_only=True)
class HistoryWidths:
    """Sizes of one sequence group.

    Attributes:
        event: Width of an event: its fields, one embedding wide each.
        max_length: The most events a row can have.
        timed: Whether :attr:`History.times` are there.
        event_only: Places of the fields that only events have; they are zero in
            :attr:`History.target`.
    """

    event: int
    max_length: int
    timed: bool = False
    event_only: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureWidths:
    """Sizes of :class:`SequenceFeatures`, from which backbones are built.

    Attributes:
        candidate: The candidate's fields, one embedding wide each.
        context: The pooled features, one embedding wide each, then ``dense`` numbers.
        histories: One for each sequence group.
        embedding: Width of one embedding.
        dense: Dense features at the end of the context.
        timed: Whether :attr:`SequenceFeatures.time` is there.
    """

    candidate: int
    context: int
    histories: tuple[HistoryWidths, ...]
    embedding: int
    dense: int = 0
    timed: bool = False
