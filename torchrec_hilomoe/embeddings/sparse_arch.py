"""Lookups: :class:`ModelInputs` -> :class:`SequenceFeatures`.

Shape legend: see :mod:`torchrec_hilomoe.embeddings.features`; D is the embedding width, F the
number of dense features.
"""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn, Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    HistoryWidths,
    ModelInputs,
    SequenceFeatures,
)
from torchrec_hilomoe.embeddings.lay_out import lay_out, LookedUp
from torchrec_hilomoe.embeddings.tables import (
    frozen_collections,
    pooled_collection,
    unpooled_collection,
)

__all__ = ["SparseArch"]

# Opaque to FX: it asks for shapes.
torch.fx.wrap("first")

TRAINED = 0  # stands for the collection of trained tables among those of frozen ones, by width


class SparseArch(nn.Module):
    """One pooled and one sequence collection, if there are such features, and their layout.

    The collections are what TorchRec shards; everything else here is small and replicated. Tables
    that the schema marks as frozen are in collections of their own: their vectors are never
    trained, and each feature that looks one up turns them into embeddings with a linear map of
    its own, which is.

    Args:
        schema: Tables and columns.
        embedding_dim: ``D``.
        device: Where the tables are made; ``meta`` until they are sharded.
        embed_dense: Whether each dense feature becomes an embedding, itself times a learned
            vector, instead of a number.

    Raises:
        ValueError: If every table of the candidate and the histories is frozen; without histories,
            if every table is.
    """

    def __init__(
        self,
        schema: Schema,
        embedding_dim: int,
        device: torch.device,
        *,
        embed_dense: bool = False,
    ) -> None:
        super().__init__()
        self._schema = schema
        self._embedding_dim = embedding_dim
        self.unpooled = unpooled_collection(schema, embedding_dim, device)
        self.pooled = pooled_collection(schema, embedding_dim, device)
        self.given = nn.ModuleDict(frozen_collections(schema, device))
        self.projections = nn.ModuleDict()
        for feature in schema.id_features:
            if feature.table in schema.frozen:
                width = schema.frozen[feature.table].width
                projection = nn.Linear(width, embedding_dim, bias=False)
                nn.init.xavier_normal_(projection.weight)
                self.projections[feature.name] = projection
        self.dense_embedding: nn.Parameter | None = None
        if embed_dense and schema.dense:
            start = torch.randn(len(schema.dense), embedding_dim)
            # Xavier's spread for a linear map from one number.
            self.dense_embedding = nn.Parameter(start * math.sqrt(2 / (1 + embedding_dim)))

    @property
    def schema(self) -> Schema:
        """Tables and columns."""
        return self._schema

    @property
    def trained_tables(self) -> tuple[nn.Parameter, ...]:
        """Tables that learn, or what this rank holds of them."""
        collections = (self.unpooled, self.pooled)
        return tuple(
            table for module in collections if module is not None for table in module.parameters()
        )

    @property
    def frozen_tables(self) -> tuple[nn.Parameter, ...]:
        """Tables that came with the data, or what this rank holds of them."""
        return tuple(self.given.parameters())

    @property
    def tables(self) -> tuple[nn.Parameter, ...]:
        """Everything that is sharded."""
        return (*self.trained_tables, *self.frozen_tables)

    @property
    def widths(self) -> FeatureWidths:
        """Sizes of what :meth:`forward` returns."""
        schema, dim = self._schema, self._embedding_dim
        embedded = len(schema.dense) if self.dense_embedding is not None else 0
        dense = len(schema.dense) - embedded
        shared = {field.table for field in schema.candidate}
        return FeatureWidths(
            candidate=len(schema.candidate) * dim,
            context=(len(schema.pooled) + embedded) * dim + dense,
            histories=tuple(
                HistoryWidths(
                    event=len(group.fields) * dim,
                    max_length=group.max_length,
                    timed=group.time is not None,
                    event_only=tuple(
                        place
                        for place, field in enumerate(group.fields)
                        if field.table not in shared
                    ),
                )
                for group in schema.sequences
            ),
            embedding=dim,
            dense=dense,
            timed=schema.time is not None,
        )

    @property
    def columns(self) -> Mapping[str, range]:
        """Where each feature stands in candidate, context and one event of each history, joined."""
        schema, dim = self._schema, self._embedding_dim
        dense = 1 if self.dense_embedding is None else dim
        widths = {
            **{feature.name: dim for feature in (*schema.candidate, *schema.pooled)},
            **dict.fromkeys(schema.dense, dense),
            **{field.name: dim for field in schema.sequence_fields},
        }
        ends = list(accumulate(widths.values()))
        return {
            name: range(end - width, end)
            for (name, width), end in zip(widths.items(), ends, strict=True)
        }

    @property
    def sides(self) -> Mapping[str, tuple[str, ...]]:
        """The features of the candidate, of the context and of the histories."""
        schema = self._schema
        return {
            "candidate": tuple(field.name for field in schema.candidate),
            "context": (*(feature.name for feature in schema.pooled), *schema.dense),
            "histories": tuple(field.name for field in schema.sequence_fields),
        }

    def forward(self, inputs: ModelInputs) -> SequenceFeatures:
        """Look up and lay out."""
        schema, rows = self._schema, inputs.rows
        vectors = self._unpooled_vectors(inputs.unpooled)
        pooled = self._pooled_vectors(inputs.pooled)
        found = LookedUp(
            unpooled={name: of_name.values() for name, of_name in vectors.items()},
            # By key: the order in which a sharded collection returns its features is the plan's.
            pooled={
                it.name: first(rows, pooled[self._width(it)][it.name])
                for it in schema.pooled_features
            },
            lengths=tuple(
                first(rows, vectors[group.fields[0].name].lengths().long())
                for group in schema.sequences
            ),
            dense=inputs.dense,
            max_seqlen=inputs.max_seqlen,
            num_tokens=inputs.num_tokens,
            time=inputs.time,
            times=inputs.times,
        )
        return lay_out(found, schema, self.projections, self.dense_embedding)

    def _unpooled_vectors(self, unpooled: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        found = {} if self.unpooled is None else {TRAINED: self.unpooled(unpooled)}
        found |= self._given("unpooled", unpooled)
        # Picked by key, since what a tracer or a sharded collection returns is no plain mapping.
        return {
            field.name: found[self._width(field)][field.name]
            for field in self._schema.unpooled_features
        }

    def _pooled_vectors(self, pooled: KeyedJaggedTensor) -> dict[int, Any]:
        # Taken apart at once: picked one by one, each feature's gradient would be as wide as that
        # of all of them together.
        found = {} if self.pooled is None else {TRAINED: self.pooled(pooled).to_dict()}
        return found | self._given("pooled", pooled)

    def _given(self, kind: str, ids: KeyedJaggedTensor) -> dict[int, Any]:
        """Look up in the frozen tables of a kind, by their width."""
        return {
            int(name.removeprefix(f"{kind}_")): collection(ids)
            for name, collection in self.given.items()
            if name.startswith(f"{kind}_")
        }

    def _width(self, feature: IdFeature | PooledFeature) -> int:
        frozen = self._schema.frozen.get(feature.table)
        return TRAINED if frozen is None else frozen.width


def first(rows: int | None, x: Tensor) -> Tensor:
    """Return the first rows of ``x``; ``x`` itself where that is all of it."""
    return x if rows is None or rows == x.shape[0] else x[:rows]
