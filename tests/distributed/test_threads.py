"""Training with several threads gives the same bits every time: what resuming exactly rests on."""

import pytest
import torch

from benchmarks.driving import assembled, check_same_state, copy_state, Driven
from benchmarks.random_batches import click_log, draw_batches, Stream
from tests.helpers.processes import run_ranks
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import PipelineOptions

ROWS, STEPS = 512, 2
# As many events as make torch share out its sums and gathers over threads, and ids that repeat.
STREAM = Stream(schema=click_log(1000, 50), mean_length=50)


def train_twice(backbone: str) -> None:
    torch.set_num_threads(2)
    context = DistributedContext(world=World(rank=0, size=1), device=torch.device("cpu"))
    experts = InjectionConfig(num_layers=2, num_experts=4, sites=("all",))
    config = RunConfig(
        model=ModelConfig(backbone=backbone, embedding_dim=8, head=(16,), hilomoe=experts),
        train=TrainConfig(batch_size=ROWS),
    )
    batches = draw_batches(STREAM, STEPS, batch_size=ROWS, rank=0, ranks=1, device=context.device)
    one, other = (assembled(config, STREAM.schema, context) for _ in range(2))
    copy_state(one, other)
    for assembly in (one, other):
        torch.manual_seed(0)
        driven = Driven(assembly, iter(batches), options=PipelineOptions(debug=True))
        for _ in range(STEPS):
            driven.step()
    check_same_state(one, other, bitwise=True)


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=[] if name == "bst" else pytest.mark.slow) for name in BACKBONES],
)
def test_training_is_reproducible_to_the_bit(backbone):
    run_ranks(train_twice, 1, backbone)
