"""Frozen tables: what was looked up is detached, so that neither a table nor its optimizer moves.

A fused optimizer ignores ``requires_grad``, and a learning rate of zero would not do: row-wise
Adagrad would go on adding up squared gradients. Without a gradient there is nothing to add.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn, Tensor
from torchrec.distributed.types import LazyAwaitable, ShardedModule
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

__all__ = ["freeze_lookups", "frozen_lookups", "lookups_of", "table_parameters"]

COLLECTIONS = (ShardedModule, EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)
LOOKUPS = (*COLLECTIONS, nn.Embedding, nn.EmbeddingBag)


def lookups_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that look tables up, by qualified name; of nested ones the outermost.

    They are TorchRec's collections, sharded or not, and PyTorch's embeddings.

    Example:
        >>> list(lookups_of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))))
        ['0']
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, LOOKUPS) and module not in inside:
            found[name] = module
            inside.update(module.modules())
    return found


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The tables of a model, or what this rank holds of them."""
    return {table for lookup in lookups_of(model).values() for table in lookup.parameters()}


def freeze_lookups(model: nn.Module, frozen: bool) -> None:
    """Detach what the model's collections look up from now on, or no longer.

    PyTorch's embeddings are frozen by ``requires_grad`` alone, because nothing is fused into them.

    Args:
        model: The model, in a wrapper or not.
        frozen: Whether its tables keep every bit.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
        >>> table = EmbeddingBagConfig(
        ...     name="item", embedding_dim=4, num_embeddings=9, feature_names=["item"]
        ... )
        >>> tables = EmbeddingBagCollection(tables=[table])
        >>> ids = KeyedJaggedTensor.from_lengths_sync(
        ...     ["item"], torch.tensor([3, 5]), torch.tensor([1, 1])
        ... )
        >>> freeze_lookups(tables, True)
        >>> tables(ids).values().requires_grad
        False
    """
    for lookup in lookups_of(model).values():
        if not isinstance(lookup, COLLECTIONS):
            continue
        hooks = lookup._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _detached]:
            del hooks[key]
        if frozen:
            lookup.register_forward_hook(_detached)


@contextmanager
def frozen_lookups(model: nn.Module) -> Iterator[None]:
    """Freeze a model's tables for some passes that must leave no trace."""
    learning = [
        lookup
        for lookup in lookups_of(model).values()
        if _detached not in lookup._forward_hooks.values()
    ]
    freeze_lookups(model, True)
    try:
        yield
    finally:
        for lookup in learning:
            freeze_lookups(lookup, False)


def _detached(lookup: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook of a collection."""
    if isinstance(output, LazyAwaitable):
        # What was sent between ranks may not have arrived; it is waited for where it is used.
        output.callbacks.append(_cut)
        return output
    return _cut(output)


def _cut(output: Any) -> Any:
    """The same vectors without a way back to their tables."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, KeyedTensor):
        return KeyedTensor(
            output.keys(), output.length_per_key(), output.values().detach(), output.key_dim()
        )
    if isinstance(output, JaggedTensor):
        return JaggedTensor(
            output.values().detach(),
            weights=output.weights_or_none(),
            lengths=output.lengths_or_none(),
            offsets=output.offsets_or_none(),
        )
    if isinstance(output, dict):
        return {name: _cut(value) for name, value in output.items()}
    if isinstance(output, tuple | list):
        return type(output)(_cut(value) for value in output)
    if isinstance(output, torch.fx.Proxy):  # a pipeline traces the model: there is no gradient
        return output
    raise ValueError(
        f"tables are to be frozen, but what they look up is a {type(output).__name__}, of which it "
        "is not known how to detach it. Let the lookup return tensors, a KeyedTensor or "
        "JaggedTensors, or set train_tables=True."
    )
