"""Lookups: ``CTRBatch``'s jagged tensors -> :class:`SequenceFeatures`.

Shape legend: see :mod:`torchrec_hilomoe.embeddings.features`; D is the embedding width.
"""

from collections.abc import Mapping

import torch
from torch import nn, Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_hilomoe.data.schema import Schema, SequenceGroup
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)
from torchrec_hilomoe.embeddings.tables import pooled_collection, unpooled_collection

__all__ = ["SparseArch"]


class SparseArch(nn.Module):
    """One pooled and one sequence collection, and how their vectors are laid out.

    The two collections are what TorchRec shards; everything else here is concatenation.

    Args:
        schema: Tables and columns.
        embedding_dim: ``D``.
        device: Where the tables are made; ``meta`` until they are sharded.

    Attributes:
        frozen: When true the vectors are detached, so that neither a table nor its fused
            optimizer's state changes. (A learning rate of zero would not do: row-wise Adagrad
            would go on adding up squared gradients.)
    """

    def __init__(self, schema: Schema, embedding_dim: int, device: torch.device) -> None:
        super().__init__()
        self.frozen = False
        self._schema = schema
        self._embedding_dim = embedding_dim
        self.unpooled = unpooled_collection(schema, embedding_dim, device)
        self.pooled = pooled_collection(schema, embedding_dim, device) if schema.pooled else None

    @property
    def widths(self) -> FeatureWidths:
        """Sizes of what :meth:`forward` returns."""
        schema, dim = self._schema, self._embedding_dim
        shared = {field.table for field in schema.candidate}
        return FeatureWidths(
            candidate=len(schema.candidate) * dim,
            context=len(schema.pooled) * dim + len(schema.dense),
            histories=tuple(
                HistoryWidths(
                    event=len(group.fields) * dim,
                    max_length=group.max_length,
                    event_only=tuple(
                        place
                        for place, field in enumerate(group.fields)
                        if field.table not in shared
                    ),
                )
                for group in schema.sequences
            ),
            embedding=dim,
            dense=len(schema.dense),
        )

    def forward(
        self, pooled: KeyedJaggedTensor, unpooled: KeyedJaggedTensor, dense_BF: Tensor, longest: int
    ) -> SequenceFeatures:
        """Look up and lay out.

        Args:
            pooled: Ids of ``schema.pooled_keys``.
            unpooled: Ids of ``schema.unpooled_keys``.
            dense_BF: Dense features, part of the context as they are.
            longest: Length of the longest history in the batch.
        """
        vectors = self.unpooled(unpooled)
        context_BP = dense_BF
        if self.pooled is not None:
            # By key: the order in which a sharded collection returns its features is the plan's.
            by_key = self.pooled(pooled)
            pooled_BD = [self._gate(by_key[feature.name]) for feature in self._schema.pooled]
            context_BP = torch.cat([*pooled_BD, dense_BF], dim=1)
        fields = {
            field.name: self._gate(vectors[field.name].values()) for field in self._schema.candidate
        }
        return SequenceFeatures(
            candidate=torch.cat([fields[field.name] for field in self._schema.candidate], dim=1),
            context=context_BP,
            histories=tuple(
                self._history(group, vectors, fields) for group in self._schema.sequences
            ),
            longest=longest,
        )

    def _history(
        self,
        group: SequenceGroup,
        vectors: Mapping[str, JaggedTensor],
        candidate: Mapping[str, Tensor],
    ) -> History:
        by_table = {field.table: candidate[field.name] for field in self._schema.candidate}
        absent_BD = torch.zeros_like(next(iter(candidate.values())))
        events_TW = torch.cat([vectors[field.name].values() for field in group.fields], dim=1)
        return History(
            events=self._gate(events_TW),
            lengths=vectors[group.fields[0].name].lengths().long(),
            target=torch.cat(
                [by_table.get(field.table, absent_BD) for field in group.fields], dim=1
            ),
        )

    def _gate(self, vectors: Tensor) -> Tensor:
        return vectors.detach() if self.frozen else vectors
