"""Autocast and the loss scale: what computes in it, what is undone before whom, what is skipped."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, MODEL, task_of
from tests.helpers.rounding import assert_within, of_sums, rounded
from tests.helpers.sharded import load_whole, parts
from torchrec_hilomoe.config import RunConfig, TrainConfig
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.optimizers.precision import LossScale
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ALL = Stage(name="all", expert_lr_scale=1.0)
BATCH = 16


def assembled(context: DistributedContext, **train) -> Assembly:
    torch.manual_seed(0)
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(learning_rate=0.1, table_optimizer="sgd", optimizer="sgd", **train),
    )
    assembly = assemble(config, build_task(MODEL, SCHEMA), context)
    return replace(assembly, model=entered(assembly))


def entered(assembly: Assembly):
    assembly.optimizers.enter(ALL)
    assembly.optimizers.set_rates(StageSpan(stage=ALL, start=0, stop=9), 0, decay=1.0)
    return enter_stage(assembly.model, ALL)


def step(assembly: Assembly) -> float:
    pipeline = Pipeline(assembly.model, assembly.optimizers.stage_optimizer, assembly.model.device)
    said = torch.linspace(-2, 2, BATCH)  # heard where there is a teacher's weight
    output = pipeline.step(replace(it, teacher_logits=said) for it in batches(BATCH, BATCH))
    pipeline.detach()
    return output.loss.item()


def held(assembly: Assembly) -> dict[str, Tensor]:
    state = training_state(assembly.model, assembly.optimizers)
    return {name: part.values for name, found in parts(state).items() for part in found}


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("model.")}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_step_in_less_precision_is_the_step_to_its_rounding(alone, precision, dtype):
    """Dense parts and tables: a scale that reached one of them would be a factor of 65536."""
    full, less = assembled(alone), assembled(alone, precision=precision)
    start = weights(held(full))
    load_whole(less.model, {name.removeprefix("model."): t for name, t in start.items()})
    losses = step(full), step(less)
    # Each map rounds once more.
    maps = sum(isinstance(module, torch.nn.Linear) for module in full.model.modules())
    assert losses[0] == rounded(losses[1], maps, dtype)
    assert losses[0] != losses[1]  # it did compute in it
    want, got = weights(held(full)), weights(held(less))
    for name, before in start.items():
        moved = (want[name] - before).norm().item()
        error = (got[name] - want[name]).norm().item()
        if not name.endswith("key.bias"):  # all rounding: it cancels in the softmax
            unit = of_sums(maps) * torch.finfo(dtype).eps
            kept = torch.finfo(torch.float32).eps * before.norm().item()
            assert error <= unit * moved + kept, f"{name}: {error:.1e} of {moved:.1e}"
        assert got[name].dtype == torch.float32
    assert all(t.dtype != dtype for t in held(less).values())


def test_the_loss_that_is_shown_is_not_scaled_and_the_auxiliary_one_is(alone):
    assembly = assembled(alone, precision="fp16", gradient_accumulation_steps=2)
    task = task_of(assembly.model)
    assert task.loss_scale == 65536
    for site in sites_of(task).values():
        assert site.auxiliary_scale == 65536 / 2 / len(sites_of(task))
    (batch,) = batches(BATCH, BATCH)
    loss, output = task(batch)
    assert loss.item() == output.loss.item() * 65536


def test_an_overflow_skips_the_step_and_halves_the_scale(alone):
    assembly = assembled(alone, precision="fp16")
    task = task_of(assembly.model)
    scale = assembly.optimizers.state_dict()["loss_scale"]["scale"]
    scale.fill_(2.0**100)  # no gradient survives it in float16
    assembly.optimizers.load_state_dict(assembly.optimizers.state_dict())
    before = held(assembly)
    step(assembly)
    after = held(assembly)
    for name, tensor in before.items():
        if "loss_scale" not in name:
            assert torch.equal(after[name], tensor), name  # tables too
    assert task.loss_scale == scale.item() == 2.0**99


def test_the_scale_is_part_of_a_checkpoint_and_comes_back():
    first = LossScale(torch.device("cpu"))
    first.load_state_dict({"scale": torch.tensor(1024.0), "since": torch.tensor(1998)})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for scale, since in [(1024.0, 1999), (2048.0, 0), (2048.0, 1)]:  # it doubles after 2000 steps
        parameter.grad = torch.full((1,), 512.0)
        first.unscale(optimizer)
        first.step(optimizer)
        assert first.state_dict()["scale"].item() == scale
        assert first.state_dict()["since"].item() == since
    assert parameter.item() == -(0.5 + 0.5 + 0.25)


def test_a_step_without_dense_gradients_needs_no_scale(alone):
    assembly = assembled(alone, precision="fp16")
    tables = Stage(name="tables", active_layers=0, train_backbone=False)
    assembly.optimizers.enter(tables)
    model = enter_stage(assembly.model, tables)
    before = held(assembly)
    step(replace(assembly, model=model))
    changed = {n for n, tensor in held(assembly).items() if not torch.equal(tensor, before[n])}
    assert changed
    assert all(".sparse." in name for name in changed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own doings, by several names
@pytest.mark.parametrize("taught", [{}, {"teacher": "models/wide", "teacher_weight": 0.7}])
def test_a_compiled_dense_part_gives_the_same_losses(alone, taught):
    plain, compiled = assembled(alone, **taught), assembled(alone, compile=True, **taught)
    start = {name.removeprefix("model."): t for name, t in weights(held(plain)).items()}
    load_whole(compiled.model, start)
    # As many maps as there are, over the rows of a batch.
    terms = BATCH * sum(isinstance(module, torch.nn.Linear) for module in plain.model.modules())
    for _ in range(2):
        assert step(compiled) == rounded(step(plain), terms, torch.float32)
    want, got = weights(held(plain)), weights(held(compiled))
    unit = of_sums(terms) * torch.finfo(torch.float32).eps
    largest = max(tensor.abs().max().item() for tensor in want.values())
    assert_within(got, want, unit * largest)
