"""Ways to drive steps: the same losses and tensors to the bit, and what micro-batches change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, in_memory, MODEL
from tests.helpers.rounding import assert_within, bounds_of, nudged, of_sums
from tests.helpers.sharded import load_whole, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.pipelines import pipeline as pipeline_module
from torchrec_hilomoe.training.pipelines.microbatches import split_microbatches
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, PipelineOptions
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ROWS, BATCH, STEPS = 100, 16, 9  # seven batches an epoch, the last of 4 rows
RATE, TABLE_RATE = 1e-2, 0.5
ALL = Stage(name="all", expert_lr_scale=1.0)
DENSE = Stage(name="dense", train_tables=False, expert_lr_scale=1.0)
# Every expert is chosen, and no balance, a product of two means over rows: in these two, parts of
# a batch are not the batch.
SMOOTH = InjectionConfig(num_layers=2, num_experts=2, top_k=2, balance_weight=0.0, z_weight=0.1)


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    rows: list[int]
    state: dict[str, Tensor]


def train(
    context: DistributedContext,
    stages: Sequence[Stage] = (ALL,),
    *,
    whole: dict[str, Tensor] | None = None,
    steps: int = STEPS,
    model=MODEL,
    **options,
) -> Trained:
    """Train as many steps in each stage, over the same rows whatever the options."""
    torch.manual_seed(0)
    config = RunConfig(
        model=model,
        train=TrainConfig(
            batch_size=BATCH,
            learning_rate=RATE,
            table_learning_rate=TABLE_RATE,
            stages=tuple(replace(stage, share=0.5) for stage in stages),
            **options,
        ),
    )
    assembly = assemble(config, build_task(config.model, SCHEMA), context)
    if whole is not None:
        load_whole(assembly.model, whole)
    train = config.train
    how = PipelineOptions(
        kind=train.pipeline,
        debug=train.debug,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
    )
    source, outputs, trained = batches(ROWS, BATCH, epochs=None), [], assembly.model
    torch.manual_seed(1)  # for dropout
    for stage in stages:
        trained = enter_stage(trained, stage)
        assembly.optimizers.enter(stage)
        assembly.optimizers.set_rates(StageSpan(stage=stage, start=0, stop=99), 0, decay=1.0)
        pipeline = Pipeline(trained, assembly.optimizers.stage_optimizer, trained.device, how)
        for count in (steps - steps // 3, steps // 3):  # a second iterator in the same stage
            segment = islice(source, count)
            outputs += [pipeline.step(segment) for _ in range(count)]
        pipeline.detach()
    state = training_state(trained, assembly.optimizers)
    return Trained(
        [output.loss.item() for output in outputs],
        [int((output.weights > 0).sum()) for output in outputs],
        {name: part.values for name, held in parts(state).items() for part in held},
    )


def assert_same(got: Trained, want: Trained) -> None:
    assert got.losses == want.losses
    assert got.rows == want.rows
    assert got.state.keys() == want.state.keys()
    for name, tensor in want.state.items():
        assert torch.equal(got.state[name], tensor), name


STAGES = (ALL, replace(DENSE, name="frozen tables", active_layers=1))
RANDOM = replace(MODEL, dropout=0.2, batch_norm=True)


@pytest.mark.parametrize(
    "options", [{"pipeline": "sparse_dist"}, {"debug": True}], ids=["sparse_dist", "debug"]
)
def test_losses_and_tensors_do_not_depend_on_how_steps_overlap(alone, options):
    want = train(alone, STAGES, model=RANDOM)
    assert want.rows[:9] == [16] * 6 + [4, 16, 16]
    assert_same(train(alone, STAGES, model=RANDOM, **options), want)


@pytest.mark.parametrize("pipeline", ["sparse_dist", "base"])
def test_micro_batches_do_not_depend_on_it_either(alone, pipeline):
    options = {"pipeline": pipeline}
    want = train(alone, STAGES, model=RANDOM, gradient_accumulation_steps=3, debug=True)
    assert want.rows[:9] == [16] * 6 + [4, 16, 16]
    assert_same(train(alone, STAGES, model=RANDOM, gradient_accumulation_steps=3, **options), want)


@pytest.mark.parametrize("gradient_accumulation_steps", [2, 4])
def test_micro_batches_add_up_to_the_batch_for_everything_dense(alone, gradient_accumulation_steps):
    """Losses, auxiliary losses and SGD's steps, to rounding, where tables stand still."""
    model = replace(MODEL, hilomoe=SMOOTH)
    torch.manual_seed(1)
    whole = in_memory(model).state_dict()
    options = {"model": model, "optimizer": "sgd", "steps": 6}
    want = train(alone, (DENSE,), whole=whole, **options)
    torch.manual_seed(2)
    others = [train(alone, (DENSE,), whole=nudged(whole), **options) for _ in range(2)]
    got = train(
        alone,
        (DENSE,),
        whole=whole,
        gradient_accumulation_steps=gradient_accumulation_steps,
        **options,
    )
    longest = max(max(tensor.shape) for tensor in whole.values())
    rounding = bounds_of(numbers(want), [numbers(other) for other in others], longest)
    assert_within(numbers(got), numbers(want), rounding)
    keys = [name for name in whole if "expert_keys" in name]
    assert keys
    assert all(not torch.equal(want.state[f"model.{name}"], whole[name]) for name in keys)


def numbers(trained: Trained) -> dict[str, Tensor]:
    return {"losses": torch.tensor(trained.losses), **trained.state}


def test_tables_step_after_each_micro_batch(alone):
    """Their optimizer is fused: later micro-batches of a step look up what earlier ones wrote."""
    model = replace(MODEL, hilomoe=replace(SMOOTH, z_weight=0.0))
    torch.manual_seed(1)
    task = in_memory(model)
    whole = {name: tensor.detach().clone() for name, tensor in task.state_dict().items()}
    got = train(
        alone,
        whole=whole,
        model=model,
        optimizer="sgd",
        table_optimizer="sgd",
        gradient_accumulation_steps=2,
        steps=1,
    )
    (batch,) = islice(batches(ROWS, BATCH), 1)
    tables = list(task.model.sparse.trained_tables)
    dense = [p for p in task.parameters() if all(p is not table for table in tables)]
    for piece in split_microbatches(batch, 2, SCHEMA.sequences):
        loss, _ = task.train()(piece)
        loss.backward()
        with torch.no_grad():
            for table in tables:
                assert table.grad is not None
                table -= TABLE_RATE * table.grad
                table.grad = None
    with torch.no_grad():
        for parameter in dense:
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
    # Two rounded updates, each of a gradient that adds up a batch's rows and a map's columns.
    longest = max(max(tensor.shape) for tensor in whole.values())
    unit = 2 * of_sums(BATCH * longest) * torch.finfo(torch.float32).eps
    for name, tensor in task.state_dict().items():
        moved = (tensor - whole[name]).abs().max()
        kept = torch.finfo(torch.float32).eps * tensor.abs()
        assert_within(got.state[f"model.{name}"], tensor, unit * moved + 2 * kept, name)
    once = train(alone, whole=whole, model=model, table_optimizer="sgd", steps=1)
    item = "model.model.sparse.unpooled.embeddings.item.weight"
    assert not torch.equal(once.state[item], got.state[item])


def test_settling_buckets_leaves_no_trace(alone, monkeypatch):
    """It is for more than two ranks; here for one, so that a run without it is at hand."""
    want = train(alone, STAGES, model=RANDOM)
    passes = []
    monkeypatch.setattr(pipeline_module, "ORDER_MATTERS_ABOVE", 0)
    monkeypatch.setattr(
        CTRBatch, "to", lambda batch, *args, **kwargs: passes.append(batch) or batch
    )
    assert_same(train(alone, STAGES, model=RANDOM), want)
    assert len(passes) == len(want.losses) + len(STAGES) * pipeline_module.PASSES
