"""What a device cannot do is refused before anything is read, with the reason and the remedy."""

import re

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from torchrec_hilomoe import Stage, StageSchedule
from torchrec_hilomoe.config import TrainConfig
from torchrec_hilomoe.training.sharding.capabilities import check_capabilities

STAGES = StageSchedule.three_stages(num_layers=2).stages


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (
            {"table_optimizer": "adam"},
            "cpu",
            "train.table_optimizer is 'adam', which cannot be fused on cpu; there use one of "
            "rowwise_adagrad, adagrad, sgd.",
        ),
        (
            {"pipeline": "prefetch"},
            "cpu",
            "train.pipeline is 'prefetch', which looks tables up on a stream of its own, which a "
            "CPU does not have; on cpu use one of auto, base, sparse_dist.",
        ),
        ({"pipeline": "semi_sync"}, "cpu", "on cpu use one of auto, base, sparse_dist"),
        (
            {"table_weight_decay": 0.1},
            "cpu",
            "train.table_weight_decay is 0.1, which has no effect with 'rowwise_adagrad' on cpu; "
            "FBGEMM ignores it on every one: set it to 0.",
        ),
        (
            {"table_weight_decay": 0.1, "table_optimizer": "sgd"},
            "cuda",
            "which has no effect with 'sgd' on cuda; use rowwise_adagrad or adam.",
        ),
        (
            {"pipeline": "prefetch", "gradient_accumulation_steps": 2},
            "cuda",
            "train.gradient_accumulation_steps is 2 with train.pipeline 'prefetch'",
        ),
        (
            {"pipeline": "semi_sync"},
            "cuda",
            "stages expert_warmup[1], expert_warmup[2] freeze the tables",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options, device, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_capabilities(TrainConfig(**options), STAGES, device)


def test_all_reasons_are_told_at_once():
    train = TrainConfig(table_optimizer="adam", pipeline="prefetch")
    with pytest.raises(ValueError, match=r"'adam'.*; train.pipeline is 'prefetch'"):
        check_capabilities(train, STAGES, "cpu")


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cpu"),
        ({"pipeline": "base", "gradient_accumulation_steps": 4}, "cpu"),
        ({"pipeline": "prefetch", "debug": True}, "cpu"),  # there is no pipeline then
        ({"pipeline": "prefetch", "table_weight_decay": 0.1}, "cuda"),
        ({"table_optimizer": "adam"}, "cuda"),
    ],
)
def test_what_can_be_done_is_not(options, device):
    check_capabilities(TrainConfig(**options), STAGES, device)


def test_semi_sync_goes_with_stages_that_learn_tables():
    check_capabilities(TrainConfig(pipeline="semi_sync"), [Stage(name="all")], "cuda")


@pytest.mark.parametrize("mode", [WeightDecayMode.L2, WeightDecayMode.DECOUPLE])
def test_fbgemm_ignores_weight_decay_on_cpu(mode):
    """Why it is refused; when this fails, the table of capabilities can be extended."""

    def trained(decay: float) -> torch.Tensor:
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.1,
            weight_decay=decay,
            weight_decay_mode=mode,
        )
        (weights,) = tables.split_embedding_weights()
        weights.data.fill_(1.0)
        for gradient in (1.0, 0.1):
            vectors = tables(torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
            (vectors * gradient).sum().backward()
        return weights.detach().clone()

    assert torch.equal(trained(0.0), trained(0.5))
