"""Schema -> TorchRec table configurations: one pooled collection and one for sequences, if any.

Frozen tables are in collections of their own, one of each kind for every width.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema

__all__ = ["frozen_collections", "pooled_collection", "unpooled_collection"]

POOLED_COPY = "_pooled"


def unpooled_collection(
    schema: Schema, embedding_dim: int, device: torch.device
) -> EmbeddingCollection | None:
    """Tables of the candidate and of the histories, which share them by name.

    Args:
        schema: Says which column indexes which table.
        embedding_dim: Width of every vector; a collection has one.
        device: Where the tables are made; ``meta`` until they are sharded.

    Returns:
        The collection; None if the schema has no histories.

    Raises:
        ValueError: If all of them are frozen.
    """
    if not schema.sequences:
        return None
    features = _features_by_table(
        field for field in schema.unpooled_features if field.table not in schema.frozen
    )
    if not features:
        raise ValueError(
            f"Schema.frozen has every table of the candidate and the histories "
            f"({', '.join(schema.frozen)}); give at least one of their fields a table that is "
            "trained, such as the item's own."
        )
    return EmbeddingCollection(
        tables=_unpooled_tables(schema, features, embedding_dim), device=device
    )


def pooled_collection(
    schema: Schema, embedding_dim: int, device: torch.device
) -> EmbeddingBagCollection | None:
    """Tables of the user, context and multi-valued features; their vectors are averaged.

    Those of the candidate are among them where there are no histories.

    A table that a sequence also uses gets a second copy here, named with the suffix
    ``_pooled``: the two collections are sharded by different rules.

    Returns:
        The collection; None if the schema has no pooled feature with a trained table.

    Raises:
        ValueError: If the schema has no histories, and all of its tables are frozen.
    """
    features = _features_by_table(
        feature for feature in schema.pooled_features if feature.table not in schema.frozen
    )
    if not features and not schema.sequences:
        raise ValueError(
            f"Schema.frozen has every table ({', '.join(schema.frozen)}); give at least one field "
            "a table that is trained, such as the item's own."
        )
    if not features:
        return None
    return EmbeddingBagCollection(
        tables=_pooled_tables(schema, features, embedding_dim), device=device
    )


def frozen_collections(
    schema: Schema, device: torch.device
) -> dict[str, EmbeddingCollection | EmbeddingBagCollection]:
    """Tables that come with the data, by ``unpooled_WIDTH`` and ``pooled_WIDTH``."""
    collections: dict[str, EmbeddingCollection | EmbeddingBagCollection] = {}
    for width in sorted({table.width for table in schema.frozen.values()}):
        chosen = {name for name, table in schema.frozen.items() if table.width == width}
        unpooled = _features_by_table(f for f in schema.unpooled_features if f.table in chosen)
        pooled = _features_by_table(f for f in schema.pooled_features if f.table in chosen)
        if unpooled:
            collections[f"unpooled_{width}"] = EmbeddingCollection(
                tables=_unpooled_tables(schema, unpooled, width), device=device
            )
        if pooled:
            collections[f"pooled_{width}"] = EmbeddingBagCollection(
                tables=_pooled_tables(schema, pooled, width), device=device
            )
    return collections


def _unpooled_tables(
    schema: Schema, features: dict[str, list[str]], width: int
) -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(
            name=table,
            embedding_dim=width,
            num_embeddings=schema.tables[table],
            feature_names=names,
            init_fn=_start(width),
        )
        for table, names in features.items()
    ]


def _pooled_tables(
    schema: Schema, features: dict[str, list[str]], width: int
) -> list[EmbeddingBagConfig]:
    sequence_tables = {field.table for field in schema.unpooled_features}
    listed = {feature.name for feature in schema.pooled if feature.max_length > 1}
    return [
        EmbeddingBagConfig(
            name=f"{table}{POOLED_COPY}" if table in sequence_tables else table,
            embedding_dim=width,
            num_embeddings=schema.tables[table],
            feature_names=names,
            # Of one id both are its vector, and FBGEMM adds up several times faster on CPU.
            pooling=PoolingType.MEAN if listed & set(names) else PoolingType.SUM,
            init_fn=_start(width),
        )
        for table, names in features.items()
    ]


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
