"""Random sequence features, and the same rows in another order or as named tensors."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchrec_hilomoe.embeddings.features import FeatureWidths, History, SequenceFeatures

__all__ = ["flat", "make_features", "select", "unflat"]

NOW = 1_700_000_000


def make_features(widths: FeatureWidths, lengths: Sequence[Sequence[int]]) -> SequenceFeatures:
    """Random features; times within a minute before the request, where histories have them.

    Args:
        widths: Sizes.
        lengths: Of each history, the events of each row.
    """
    rows = len(lengths[0])
    histories = tuple(
        History(
            events=torch.randn(sum(of_rows), history.event),
            lengths=torch.tensor(of_rows, dtype=torch.int64),
            target=_target(rows, history.event, history.event_only, widths.embedding),
            times=NOW - torch.randint(60, (sum(of_rows),)) if history.timed else None,
        )
        for of_rows, history in zip(lengths, widths.histories, strict=True)
    )
    return SequenceFeatures(
        candidate=torch.randn(rows, widths.candidate),
        context=torch.randn(rows, widths.context),
        histories=histories,
        max_seqlen=max([1, *(length for of_rows in lengths for length in of_rows)]),
        time=torch.full((rows,), NOW) if widths.timed else None,
    )


def select(features: SequenceFeatures, rows: list[int]) -> SequenceFeatures:
    """The same rows, in another order or alone, padded to no more than they need."""
    histories = []
    for history in features.histories:
        places = torch.arange(len(history.events)).split(history.lengths.tolist())
        chosen = torch.cat([places[row] for row in rows])
        histories.append(
            History(
                events=history.events[chosen],
                lengths=history.lengths[rows],
                target=history.target[rows],
                times=None if history.times is None else history.times[chosen],
            )
        )
    return SequenceFeatures(
        candidate=features.candidate[rows],
        context=features.context[rows],
        histories=tuple(histories),
        max_seqlen=max(1, *(int(history.lengths.max()) for history in histories)),
        time=None if features.time is None else features.time[rows],
    )


def flat(features: SequenceFeatures) -> dict[str, Tensor]:
    """The features' floating-point tensors by name."""
    tensors = {"candidate": features.candidate, "context": features.context}
    for index, history in enumerate(features.histories):
        tensors |= {f"events.{index}": history.events, f"target.{index}": history.target}
    return tensors


def unflat(tensors: dict[str, Tensor], like: SequenceFeatures) -> SequenceFeatures:
    """``like`` with the tensors of :func:`flat`; other names are left out."""
    histories = tuple(
        replace(history, events=tensors[f"events.{i}"], target=tensors[f"target.{i}"])
        for i, history in enumerate(like.histories)
    )
    return replace(
        like, candidate=tensors["candidate"], context=tensors["context"], histories=histories
    )


def _target(rows: int, width: int, event_only: Sequence[int], embedding: int) -> Tensor:
    target = torch.randn(rows, width)
    for field in event_only:
        target[:, field * embedding : (field + 1) * embedding] = 0.0
    return target
