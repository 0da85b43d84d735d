"""Looked-up vectors -> :class:`SequenceFeatures`: the same in training and in serving.

Who looks up, TorchRec's sharded collections or the plain tables of an exported model, is no matter
here.

Shape legend: see :mod:`torchrec_hilomoe.embeddings.features`; D is the embedding width, F the
number of dense features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn, Tensor

from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.features import History, SequenceFeatures

__all__ = ["LookedUp", "lay_out"]


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """What lookups found, each feature's vectors in the width of its table.

    Attributes:
        unpooled: Vectors of each id of the histories' fields, ``(T, D)``, and of the candidate's,
            ``(B, D)``.
        pooled: Vectors of each pooled feature, ``(B, D)``; the candidate's fields, too, may be
            here.
        lengths: ``(B,)`` int64 of each sequence group, events of each row.
        dense: ``(B, F)``.
        max_seqlen: Length of the longest history in the batch, at least 1.
        num_tokens: As in :class:`~torchrec_hilomoe.embeddings.features.ModelInputs`.
        time: As there.
        times: As there.
        shared: Whether histories are those of one user, whom all rows are of; ``lengths`` are
            ``(1,)`` then.
    """

    unpooled: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor]
    lengths: tuple[Tensor, ...]
    dense: Tensor
    max_seqlen: int
    num_tokens: int | None = None
    time: Tensor | None = None
    times: tuple[Tensor, ...] = ()
    shared: bool = False


def lay_out(
    found: LookedUp,
    schema: Schema,
    projections: nn.ModuleDict,
    dense_embedding: Tensor | None,
) -> SequenceFeatures:
    """Lay out vectors as backbones receive them.

    Args:
        found: The vectors.
        schema: Which feature is what.
        projections: The map of each feature whose table is frozen.
        dense_embedding: ``(F, D)``, a vector of each dense feature; None leaves them numbers.
    """

    def vectors(feature: str, looked_up: Tensor) -> Tensor:
        if feature in projections:
            return projections[feature](looked_up.detach())
        return looked_up

    singles = {**found.pooled, **found.unpooled}
    fields = {field.name: vectors(field.name, singles[field.name]) for field in schema.candidate}
    moments = {name: found.times[place] for place, name in enumerate(schema.event_times)}
    dense_BF = found.dense
    parts = [vectors(feature.name, found.pooled[feature.name]) for feature in schema.pooled]
    if dense_embedding is not None:
        dense_BF = (dense_BF[:, :, None] * dense_embedding).flatten(1)
    by_table = {field.table: fields[field.name] for field in schema.candidate}
    absent_BD = torch.zeros_like(next(iter(fields.values())))
    histories = tuple(
        History(
            events=torch.cat(
                [vectors(field.name, found.unpooled[field.name]) for field in group.fields], dim=1
            ),
            lengths=lengths_B,
            target=torch.cat(
                [by_table.get(field.table, absent_BD) for field in group.fields], dim=1
            ),
            times=None if group.time is None else moments[group.time],
            shared=found.shared,
        )
        for group, lengths_B in zip(schema.sequences, found.lengths, strict=True)
    )
    # One copy of every vector: each of candidate and context is a part of it.
    joined_BS = torch.cat([*fields.values(), *parts, dense_BF], dim=1)
    candidate = sum(vectors_BD.shape[1] for vectors_BD in fields.values())
    return SequenceFeatures(
        candidate=joined_BS[:, :candidate],
        context=joined_BS[:, candidate:],
        joined=joined_BS,
        histories=histories,
        max_seqlen=found.max_seqlen,
        time=found.time if schema.time is not None else None,
        num_tokens=found.num_tokens,
    )
