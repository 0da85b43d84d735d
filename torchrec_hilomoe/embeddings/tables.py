"""Schema -> TorchRec table configurations: one pooled collection and one for sequences."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema

__all__ = ["pooled_collection", "unpooled_collection"]


def unpooled_collection(
    schema: Schema, embedding_dim: int, device: torch.device
) -> EmbeddingCollection:
    """Tables of the candidate and of the histories, which share them by name.

    Args:
        schema: Says which column indexes which table.
        embedding_dim: Width of every vector; a collection has one.
        device: Where the tables are made; ``meta`` until they are sharded.
    """
    features = _features_by_table((*schema.candidate, *schema.sequence_fields))
    tables = [
        EmbeddingConfig(
            name=table,
            embedding_dim=embedding_dim,
            num_embeddings=schema.tables[table],
            feature_names=names,
            init_fn=_start(embedding_dim),
        )
        for table, names in features.items()
    ]
    return EmbeddingCollection(tables=tables, device=device)


def pooled_collection(
    schema: Schema, embedding_dim: int, device: torch.device
) -> EmbeddingBagCollection:
    """Tables of the user, context and multi-valued features; their vectors are averaged.

    A table that a sequence also uses gets a second copy here, named with the suffix
    ``_pooled``: the two collections are sharded by different rules.
    """
    features = _features_by_table(schema.pooled)
    sequence_tables = {field.table for field in (*schema.candidate, *schema.sequence_fields)}
    tables = [
        EmbeddingBagConfig(
            name=f"{table}_pooled" if table in sequence_tables else table,
            embedding_dim=embedding_dim,
            num_embeddings=schema.tables[table],
            feature_names=names,
            pooling=PoolingType.MEAN,
            init_fn=_start(embedding_dim),
        )
        for table, names in features.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=device)


def _features_by_table(features: Iterable[IdFeature | PooledFeature]) -> dict[str, list[str]]:
    by_table: dict[str, list[str]] = {}
    for feature in features:
        by_table.setdefault(feature.table, []).append(feature.name)
    return by_table


def _draw(weight: Tensor, std: float) -> None:
    """Start near zero, where row-wise Adagrad moves a vector at once."""
    if weight.numel():  # a rank without a shard of the table holds nothing to draw
        torch.nn.init.normal_(weight, std=std)


def _start(embedding_dim: int) -> Callable[[Tensor], None]:
    return partial(_draw, std=0.1 / math.sqrt(embedding_dim))
