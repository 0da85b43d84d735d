"""``SequenceFeatures``: what every backbone receives.

Shape legend:
    B  rows
    T  events of all rows together, without padding
    C  candidate width (fields x embedding)
    W  width of one event (fields x embedding)
    P  context width (pooled vectors and dense features)
"""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["FeatureWidths", "History", "HistoryWidths", "SequenceFeatures"]


@dataclass(frozen=True)
class History:
    """One behaviour sequence of each row, jagged.

    Attributes:
        events: ``(T, W)``, row after row, oldest event first.
        lengths: ``(B,)`` int64, events of each row.
        target: ``(B, W)``, the candidate in the layout of an event: the fields that share a
            table stand in the same place, and a field that only events have is zero.
    """

    events: Tensor
    lengths: Tensor
    target: Tensor


@dataclass(frozen=True)
class SequenceFeatures:
    """Vectors of a batch: plain tensors, so that a backbone knows nothing of tables.

    Attributes:
        candidate: ``(B, C)``.
        context: ``(B, P)``.
        histories: One for each sequence group of the schema.
        longest: Length of the longest history in the batch, at least 1.
    """

    candidate: Tensor
    context: Tensor
    histories: tuple[History, ...]
    longest: int


@dataclass(frozen=True, kw_only=True)
class HistoryWidths:
    """Sizes of one sequence group: width of an event, and the most events a row can have."""

    event: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class FeatureWidths:
    """Sizes of :class:`SequenceFeatures`, from which backbones are built."""

    candidate: int
    context: int
    histories: tuple[HistoryWidths, ...]
