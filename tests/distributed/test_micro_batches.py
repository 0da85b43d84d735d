"""Micro-batches on two ranks against whole batches on one: gradients are averaged once, rightly."""

from dataclasses import replace

import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.models import batches, in_memory, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, bounds_of, nudged
from tests.helpers.sharded import assembled, joined, load_whole, Part, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, PipelineOptions
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ROWS, BATCH, STEPS = 64, 16, 4
MAX_GRAD_NORMS = (1e9, 0.05)  # none is that long; all are longer
# Tables stand still: theirs is a step a micro-batch. Every expert is chosen, so that rounding
# cannot choose another, and balance is left out: it is a product of two means over a micro-batch.
DENSE = Stage(name="dense", train_tables=False, expert_lr_scale=1.0)
EXPERTS = InjectionConfig(num_layers=2, num_experts=2, top_k=2, balance_weight=0.0, z_weight=0.1)


def train_all(whole: dict[str, Tensor], micro_batches: int) -> list[dict[str, list[Part]]]:
    return [train(whole, micro_batches, max_grad_norm) for max_grad_norm in MAX_GRAD_NORMS]


def train(
    whole: dict[str, Tensor], micro_batches: int, max_grad_norm: float
) -> dict[str, list[Part]]:
    config = RunConfig(
        model=replace(MODEL, hilomoe=EXPERTS),
        train=TrainConfig(
            batch_size=BATCH,
            gradient_accumulation_steps=micro_batches,
            learning_rate=0.5,
            optimizer="sgd",
            max_grad_norm=max_grad_norm,
            stages=(DENSE,),
        ),
    )
    assembly = assembled(config)
    load_whole(assembly.model, whole)
    model = enter_stage(assembly.model, DENSE)
    assembly.optimizers.enter(DENSE)
    assembly.optimizers.set_rates(StageSpan(stage=DENSE, start=0, stop=STEPS), 0, decay=1.0)
    how = PipelineOptions(gradient_accumulation_steps=micro_batches)
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device, how)
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    source = batches(ROWS, BATCH, world=world)
    for _ in range(STEPS):
        pipeline.step(source)
    pipeline.detach()
    return parts(training_state(model, assembly.optimizers))


def test_two_ranks_with_two_micro_batches_are_one_with_whole_batches():
    torch.manual_seed(2)
    task = in_memory(replace(MODEL, hilomoe=EXPERTS))
    whole = {name: tensor.detach().clone() for name, tensor in task.state_dict().items()}
    with init_distributed("cpu"):
        alone = train_all(whole, micro_batches=1)
        others = [train_all(nudged(whole), micro_batches=1) for _ in range(2)]
    first, second = run_ranks(train_all, 2, whole, 2)
    longest = max(max(tensor.shape) for tensor in whole.values())
    for at, (one, *two) in enumerate(zip(alone, first, second, strict=True)):
        want, got = joined([one]), joined(two)
        rounding = bounds_of(want, [joined([other[at]]) for other in others], longest)
        assert_within(got, want, rounding, f"clipped to {MAX_GRAD_NORMS[at]}")
        moved = 0
        for name, tensor in want.items():
            if name.startswith("model.") and ".sparse." not in name:
                moved += not torch.equal(tensor, whole[name.removeprefix("model.")])
        assert moved > 20
        for name in (name for name in two[0] if ".sparse." not in name):
            assert torch.equal(two[0][name][0].values, two[1][name][0].values), name
    length = {name: held[0].values for name, held in alone[0].items()}
    assert any(not torch.equal(length[n], held[0].values) for n, held in alone[1].items())
