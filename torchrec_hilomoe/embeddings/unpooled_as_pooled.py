"""Unpooled lookups on CPU as bags of one id each: the same vectors and updates, a faster backward.

FBGEMM's CPU backward of an unpooled lookup costs some 10 microseconds for each distinct id, that
of a pooled one .04 (``benchmarks/bench_lookups.py``). A bag of one id is that id's vector, so a
kernel that TorchRec has made for sequences is told to pool, and around each call

- before: each feature's ids become bags of one, and empty bags up to the longest feature, since a
  pooled lookup wants as many bags of each;
- after: each feature's columns, less its empty bags, are laid out one below the other, as an
  unpooled lookup returns them.

Tables, their sharding, the names of their state and the optimizer stay as they are.
"""

from itertools import chain
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn, Tensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

__all__ = ["look_up_unpooled_as_pooled"]


def look_up_unpooled_as_pooled(collection: ShardedEmbeddingCollection) -> None:
    """Make a sharded sequence collection's kernels pool bags of one, where they compute on CPU.

    Results equal those of unpooled lookups to rounding. Kernels on other devices, those that pool
    already, those with an empty table and those that train outside FBGEMM stay as they are; so
    calling it again does nothing.

    Args:
        collection: As TorchRec shards an ``EmbeddingCollection``.
    """
    # TorchRec keeps them in a list, so they are no modules of the collection.
    for kernel in chain.from_iterable(lookup.modules() for lookup in collection._lookups):
        if (
            isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
            and kernel.pooling_mode == PoolingMode.NONE
            # A part without rows, of a table smaller than the job, is more than pooling can take.
            and all(
                rows and device == ComputeDevice.CPU
                for rows, _dim, _place, device in kernel.embedding_specs
            )
        ):
            kernel.pooling_mode = PoolingMode.SUM
            kernel.is_nobag = False
            kernel.register_forward_pre_hook(_make_bags, with_kwargs=True)
            kernel.register_forward_hook(_lay_out, with_kwargs=True)


def _make_bags(
    kernel: SplitTableBatchedEmbeddingBagsCodegen, args: tuple[()], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    features = len(kernel.feature_table_map)
    offsets = kwargs["offsets"]
    stride = (len(offsets) - 1) // features
    bounds = offsets[::stride] if stride else offsets.new_zeros(features + 1)
    bags = max(1, int(bounds.diff().max()))  # the kernel wants one, be it empty
    # A bag begins where the one before ends; past a feature's last id, all begin at its end.
    starts = bounds[:-1, None] + torch.arange(bags, device=offsets.device, dtype=offsets.dtype)
    starts = torch.minimum(starts, bounds[1:, None])
    return args, {**kwargs, "offsets": torch.cat([starts.flatten(), bounds[-1:]])}


def _lay_out(
    _kernel: nn.Module, _args: tuple[()], kwargs: dict[str, Any], pooled: Tensor
) -> Tensor:
    counts = kwargs["offsets"][:: len(pooled)].diff().tolist()
    # One split, whose backward is one copy; a slice of each would add up gradients of full size.
    columns = pooled.split(pooled.shape[1] // len(counts), dim=1)
    return torch.cat([column[:count] for column, count in zip(columns, counts, strict=True)])
