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
        times: ``(T,)`` int64, when each event happened, in seconds; None where the data do not say.
    """

    events: Tensor
    lengths: Tensor
    target: Tensor
    times: Tensor | None = None


@dataclass(frozen=True)
class SequenceFeatures:
    """Vectors of a batch: plain tensors, so that a backbone knows nothing of tables.

    Attributes:
        candidate: ``(B, C)``.
        context: ``(B, P)``.
        histories: One for each sequence group of the schema.
        longest: Length of the longest history in the batch, at least 1.
        time: ``(B,)`` int64, when the candidate was shown, in seconds; None where the data do not
            say.
        steps: Events of each row's longest history, summed over rows; None where the host does
            not know.
    """

    candidate: Tensor
    context: Tensor
    histories: tuple[History, ...]
    longest: int
    time: Tensor | None = None
    steps: int | None = None


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
