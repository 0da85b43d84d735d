"""A sharded model against the same model whole: outputs, gradients, and tables after a step."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.models import batches, cancelled, dense_parameters, in_memory, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, of_sums, rounding_of
from tests.helpers.sharded import assembled, joined, load_whole, Part, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline, predict
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ROWS, BATCH = 37, 24  # two batches, of which the second is cut short: 24 and 13 rows
RATE, TABLE_RATE, WARMUP = 1e-3, 0.1, 0.5
ADAM_EPS = FBGEMM_EPS = 1e-8  # in the denominators of their steps
ALL = Stage(name="all", warmup_steps=2)
# Every expert is chosen: a choice that hangs on a rounding would not be a fair comparison.
EXPERTS = InjectionConfig(num_layers=2, num_experts=2, top_k=2, sites=("all",), balance_weight=0.1)
BY_FEATURE = replace(EXPERTS, routing="sample", route_by=(("place",), ("kind", "clicks_item")))
CASES = {name: (name, EXPERTS) for name in BACKBONES} | {"bst, by feature": ("bst", BY_FEATURE)}
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
        assembly.model, assembly.optimizers.combined, batches(ROWS, BATCH, world=world)
    )
    logits = torch.cat([output.logits[output.weights > 0] for output in evaluation])
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    assembly.optimizers.set_rates(StageSpan(stage=ALL, start=0, stop=9), 0, decay=1.0)
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    _, second = batches(ROWS, BATCH, world=world)
    output = pipeline.step(iter([second]))
    pipeline.detach()
    return Step(logits, output.loss.item(), parts(training_state(model, assembly.optimizers)))


def logits_of(task: TrainTask) -> Tensor:
    with torch.no_grad():
        return torch.cat([task(batch)[1].logits for batch in batches(ROWS, BATCH)])


def loss_and_gradients(task: TrainTask) -> dict[str, Tensor]:
    """Of a step on the second batch."""
    _, second = batches(ROWS, BATCH)
    task.zero_grad()
    loss, _ = task(second)
    loss.backward()
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    assert found.keys() == dict(task.named_parameters()).keys()
    return {"loss": loss, **found}


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
    want, got = logits_of(task), torch.cat([step.logits for step in steps])
    # Ranks interleave the batches' rows, so the order is another, but the numbers are the same.
    assert_within(got.sort().values, want.sort().values, rounding_of(logits_of, task))


def test_a_step_has_the_gradients_and_the_tables_of_the_whole_model(comparison):
    task, whole, steps = comparison.task.train(), comparison.whole, comparison.steps
    rounding = rounding_of(loss_and_gradients, task)
    want = loss_and_gradients(task)
    loss = torch.tensor(sum(step.loss for step in steps) / len(steps))
    assert_within(loss, want["loss"], rounding["loss"])

    state = joined([step.state for step in steps])
    eps = torch.finfo(torch.float32).eps
    for name in dense_parameters(task).keys() - cancelled(task):
        gradient = want[name]
        # Adam's first moment after one step is a tenth of the averaged gradient.
        if name.rpartition(".")[2] in ("expert_in", "expert_out", "expert_keys"):
            keys = [f"optimizer.state.experts.{name}.{layer}.exp_avg" for layer in (1, 2)]
            moment = torch.stack([state[key] for key in keys])
        else:
            moment = state[f"optimizer.state.backbone.{name}.exp_avg"]
        assert_within(moment * 10, gradient, rounding[name], name)
        # What is added before a softmax cancels, too: Adam moves it, but where to is rounding.
        steepest = gradient.abs().max().item() - rounding[name]
        if steepest > 0:
            moved = (state[f"model.{name}"] - whole[name]).abs().max().item()
            rate = RATE * WARMUP * (ALL.expert_lr_scale if "expert" in name else 1.0)
            # A step's handful of operations is rounded, and so is what it is taken from.
            slack = of_sums(4) * eps * (rate + whole[name].abs().max().item())
            least = rate * steepest / (steepest + ADAM_EPS)
            assert least - slack <= moved <= rate + slack, name
    for name, _ in task.model.sparse.named_parameters():
        key = f"model.sparse.{name}"
        gradient, error, table = want[key], rounding[key], name.split(".")[-2]
        sums = gradient.square().mean(dim=1)  # row-wise Adagrad's state
        steepest = gradient.abs().amax(dim=1)
        of_sum = 2 * steepest * error + error**2
        assert_within(state[f"optimizer.state.tables.{key}.{table}.momentum1"], sums, of_sum, key)
        # A row that was looked up moves by its direction, which is as exact as its gradient is.
        length = (sums.sqrt() + FBGEMM_EPS).unsqueeze(1)
        update = TABLE_RATE * WARMUP * gradient / length
        bound = TABLE_RATE * WARMUP * 2 * error / length + 2 * eps * whole[key].abs()
        bound = torch.where(steepest.unsqueeze(1) > 0, bound, 0.0)  # the others stay as they are
        assert_within(state[f"model.{key}"], whole[key] - update, bound, key)


def test_replicated_parts_are_equal_to_the_bit(comparison):
    first, *others = [step.state for step in comparison.steps]
    replicated = {name for name in first if ".sparse." not in name}
    assert len(replicated) > 50
    for name in replicated:
        for other in others:
            assert torch.equal(first[name][0].values, other[name][0].values), name
