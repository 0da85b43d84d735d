"""Bags of one id give what unpooled lookups give: vectors, updates, optimizer state."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, of_sums
from tests.helpers.sharded import assembled
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.embeddings.unpooled_as_pooled import look_up_unpooled_as_pooled
from torchrec_hilomoe.models.train_task import TrainTask

ROWS, WIDTH = (7, 50), 8
TABLES = (0, 0, 1)  # of three features, of which two share one


def kernel(optimizer: EmbOptimType, mode: PoolingMode = PoolingMode.NONE):
    torch.manual_seed(0)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=list(TABLES),
        optimizer=optimizer,
        learning_rate=0.1,
        pooling_mode=mode,
    )
    for table in made.split_embedding_weights():
        table.data.normal_()
    return made


def collection(*kernels: nn.Module) -> ShardedEmbeddingCollection:
    """All that matters here of a sharded one: where TorchRec keeps its kernels."""
    made = ShardedEmbeddingCollection.__new__(ShardedEmbeddingCollection)
    nn.Module.__init__(made)
    made._lookups = [nn.ModuleList(kernels)]
    return made


def lookup(lengths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and offsets of a batch, from the lengths of each feature's rows."""
    ids = [
        torch.randint(ROWS[table], (sum(row),)) for table, row in zip(TABLES, lengths, strict=True)
    ]
    ends = torch.tensor([length for row in lengths for length in row], dtype=torch.int64).cumsum(0)
    return torch.cat(ids), torch.cat([ends.new_zeros(1), ends])


LENGTHS = {
    "unequal": [[3, 0, 5, 1], [1, 1, 1, 1], [0, 0, 9, 0]],
    "one is empty": [[2, 1], [0, 0], [4, 4]],
    "all are empty": [[0, 0], [0, 0], [0, 0]],
    "no rows": [[], [], []],
    "one row": [[4], [1], [2]],
}


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_SGD])
@pytest.mark.parametrize("case", LENGTHS)
def test_vectors_and_updates_are_those_of_unpooled_lookups(optimizer, case):
    def close(got: torch.Tensor, want: torch.Tensor) -> None:
        # A number adds up its start, and what so many lookups a step have given it.
        unit = of_sums(1 + 3 * sum(map(sum, LENGTHS[case]))) * torch.finfo(torch.float32).eps
        assert_within(got, want, unit * max([1.0, *want.abs().flatten().tolist()]))

    plain, bags = kernel(optimizer), kernel(optimizer)
    look_up_unpooled_as_pooled(collection(bags))
    assert bags.pooling_mode == PoolingMode.SUM
    for seed in range(3):
        torch.manual_seed(seed)
        ids, offsets = lookup(LENGTHS[case])
        want, got = (each(indices=ids, offsets=offsets) for each in (plain, bags))
        assert got.shape == (len(ids), WIDTH)
        assert torch.equal(got, want) or seed  # before any update, to the bit
        close(got, want)
        if case != "no rows":
            gradient = torch.randn_like(want)
            want.backward(gradient)
            got.backward(gradient)
    states = [
        [
            *each.split_embedding_weights(),
            *(s for one in each.split_optimizer_states() for s in one),
        ]
        for each in (plain, bags)
    ]
    for want, got in zip(*states, strict=True):
        close(got, want)


def test_twice_is_once_and_pooled_lookups_stay_as_they_are():
    pooled, bags = (
        kernel(EmbOptimType.EXACT_SGD, mode) for mode in (PoolingMode.MEAN, PoolingMode.NONE)
    )
    both = collection(pooled, bags)
    look_up_unpooled_as_pooled(both)
    look_up_unpooled_as_pooled(both)
    assert pooled.pooling_mode == PoolingMode.MEAN
    assert not pooled._forward_hooks
    assert len(bags._forward_hooks) == 1


def modes_of_a_job() -> set[str]:
    task = assembled(RunConfig()).model.module
    assert isinstance(task, TrainTask)
    sharded = task.model.sparse.unpooled
    assert isinstance(sharded, ShardedEmbeddingCollection)
    return {
        PoolingMode(module.pooling_mode).name
        for lookup in sharded._lookups
        for module in lookup.modules()
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
    }


def test_training_looks_histories_up_so():
    assert run_ranks(modes_of_a_job, 1) == [{"SUM"}]
