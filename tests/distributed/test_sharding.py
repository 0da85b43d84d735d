"""A sharded model against the same model whole: outputs, gradients, and tables after a step."""

import io
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.features import select
from tests.helpers.models import batches, cancelled, dense_parameters, in_memory, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.sharded import assembled, joined, load_whole, Part, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.build import BUILDERS
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, predict
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ROWS, BATCH = 37, 24  # two batches, of which the second is cut short: 24 and 13 rows
RATE, TABLE_RATE, WARMUP = 1e-3, 0.1, 0.5
ALL = Stage(name="all", warmup_steps=2)
# Every expert is chosen: a choice that hangs on a rounding would not be a fair comparison.
EXPERTS = InjectionConfig(num_layers=2, num_experts=2, top_k=2, sites=("all",), balance_weight=0.1)
BY_FEATURE = replace(EXPERTS, routing="sample", route_by=(("place",), ("kind", "clicks_item")))
CASES = {name: (name, EXPERTS) for name in BUILDERS} | {"bst, by feature": ("bst", BY_FEATURE)}
CONFIGS = {
    case: RunConfig(
        # Batch norm: statistics, too, must be those of the whole batch.
        model=replace(MODEL, backbone=backbone, batch_norm=True, hilomoe=experts),
        train=TrainConfig(batch_size=BATCH, learning_rate=RATE, table_learning_rate=TABLE_RATE),
    )
    for case, (backbone, experts) in CASES.items()
}


@dataclass(frozen=True)
class Step:
    """What a rank knows after predicting both batches and training on the second."""

    logits: Tensor
    loss: float
    state: dict[str, list[Part]]


def predict_and_step_each(saved: bytes) -> dict[str, Step]:
    wholes = torch.load(io.BytesIO(saved))
    return {name: predict_and_step(CONFIGS[name], whole) for name, whole in wholes.items()}


def predict_and_step(config: RunConfig, whole: dict[str, Tensor]) -> Step:
    assembly = assembled(config)
    load_whole(assembly.model, whole)
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    evaluation = predict(
        assembly.model, assembly.learners.combined, batches(ROWS, BATCH, world=world)
    )
    logits = torch.cat([output.logits[output.weights > 0] for output in evaluation])
    model = enter_stage(assembly.model, ALL)
    assembly.learners.enter(ALL)
    assembly.learners.set_rates(StageSpan(stage=ALL, start=0, stop=9), 0, decay=1.0)
    pipeline = Pipeline(model, assembly.learners.stepping, model.device)
    _, second = batches(ROWS, BATCH, world=world)
    output = pipeline.step(iter([second]))
    pipeline.detach()
    return Step(logits, output.loss.item(), parts(training_state(model, assembly.learners)))


def close(got: Tensor, want: Tensor, name: str, floor: float = 1e-6, noise: float = 0.0) -> None:
    """Equal but for the order in which the rows' terms were added, in float32.

    ``noise`` is what another such order has changed, where norms make that more than usual.
    """
    unit = 256 * torch.finfo(torch.float32).eps * ROWS**0.5
    error = (got - want).abs().max().item()
    bound = max(unit * max(want.abs().max().item(), floor), 8 * noise)
    assert error <= bound, f"{name}: {error:.1e}"


def gradients_backwards(task: TrainTask, batch: CTRBatch) -> dict[str, Tensor]:
    """The dense parameters' gradients once more, the rows' terms being added from the last on."""
    other, order = deepcopy(task), list(reversed(range(len(batch.labels))))
    other.zero_grad()
    other.model.backbone.register_forward_pre_hook(lambda _, args: select(args[0], order))
    loss, _ = other(replace(batch, labels=batch.labels[order], weights=batch.weights[order]))
    loss.backward()
    return {name: p.grad for name, p in dense_parameters(other).items() if p.grad is not None}


@dataclass(frozen=True)
class Comparison:
    """The whole model before any step, and what the ranks of a job made of it."""

    task: TrainTask
    whole: dict[str, Tensor]
    steps: list[Step]


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def comparisons(request: pytest.FixtureRequest) -> dict[str, Comparison]:
    """Of every backbone, on as many ranks as the parameter says."""
    torch.manual_seed(1)
    tasks = {name: in_memory(config.model) for name, config in CONFIGS.items()}
    with torch.no_grad():  # what starts at zero, or near it, would hide errors in the rest
        for task in tasks.values():
            for name, parameter in task.named_parameters():
                if name.endswith("expert_out"):
                    parameter.normal_(std=0.3)
                if ".sparse." in name:
                    parameter.mul_(10)
    wholes = {
        name: {key: tensor.detach().clone() for key, tensor in task.state_dict().items()}
        for name, task in tasks.items()
    }
    saved = io.BytesIO()  # each tensor by itself would be a file descriptor, and those are few
    torch.save(wholes, saved)
    ranks = run_ranks(predict_and_step_each, request.param, saved.getvalue())
    return {
        name: Comparison(tasks[name], wholes[name], [steps[name] for steps in ranks])
        for name in tasks
    }


@pytest.fixture(params=CASES)
def comparison(request: pytest.FixtureRequest, comparisons: dict[str, Comparison]) -> Comparison:
    return comparisons[request.param]


def test_predictions_are_those_of_the_whole_model(comparison):
    task, steps = comparison.task.eval(), comparison.steps
    with torch.no_grad():
        want = torch.cat([task(batch)[1].logits for batch in batches(ROWS, BATCH)])
    got = torch.cat([step.logits for step in steps])
    # Ranks interleave the batches' rows, so the order is another, but the numbers are the same.
    torch.testing.assert_close(got.sort().values, want.sort().values)


def test_a_step_has_the_gradients_and_the_tables_of_the_whole_model(comparison):
    task, whole, steps = comparison.task.train(), comparison.whole, comparison.steps
    task.zero_grad()
    _, second = batches(ROWS, BATCH)
    loss, _ = task(second)
    loss.backward()
    assert sum(step.loss for step in steps) / len(steps) == pytest.approx(loss.item(), rel=1e-5)

    state = joined([step.state for step in steps])
    gradients = {name: p.grad for name, p in dense_parameters(task).items() if p.grad is not None}
    assert gradients.keys() == dense_parameters(task).keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    backwards = gradients_backwards(task, second)
    for name in gradients.keys() - cancelled(task):
        gradient = gradients[name]
        # Adam's first moment after one step is a tenth of the averaged gradient.
        if name.rpartition(".")[2] in ("expert_in", "expert_out", "expert_keys"):
            keys = [f"optimizer.state.experts.{name}.{layer}.exp_avg" for layer in (1, 2)]
            moment = torch.stack([state[key] for key in keys])
        else:
            moment = state[f"optimizer.state.backbone.{name}.exp_avg"]
        noise = (gradient - backwards[name]).abs().max().item()
        close(moment * 10, gradient, name, floor=1e-3 * largest, noise=noise)
        # What is added before a softmax cancels, too: Adam moves it, but where to is rounding.
        if gradient.abs().max() > 1e-5 * largest:
            moved = (state[f"model.{name}"] - whole[name]).abs().max().item()
            rate = RATE * WARMUP * (ALL.expert_rate if "expert" in name else 1.0)
            assert moved == pytest.approx(rate, rel=0.1), name
    for name, parameter in task.model.sparse.named_parameters():
        key, gradient = f"model.sparse.{name}", parameter.grad
        assert gradient is not None
        table = name.split(".")[-2]
        sums = gradient.square().mean(dim=1)  # row-wise Adagrad's state
        close(state[f"optimizer.state.tables.{key}.{table}.momentum1"], sums, f"{key} sums")
        update = TABLE_RATE * WARMUP * gradient / (sums.sqrt() + 1e-8).unsqueeze(1)  # FBGEMM's eps
        close(state[f"model.{key}"], whole[key] - update, key)


def test_replicated_parts_are_equal_to_the_bit(comparison):
    first, *others = [step.state for step in comparison.steps]
    replicated = {name for name in first if ".sparse." not in name}
    assert len(replicated) > 50
    for name in replicated:
        for other in others:
            assert torch.equal(first[name][0].values, other[name][0].values), name
