"""Optimizers by stage: whose rule is followed, what decays, what is clipped, what stays."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import dense_parameters, MODEL, task_of
from tests.helpers.rounding import assert_within, of_sums, rounded
from torchrec_hilomoe.config import RunConfig, TrainConfig
from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.assemble import assemble, Assembly
from torchrec_hilomoe.training.stages import Stage, StageSpan

RATE, MOMENTUM = 1e-2, 0.9
# The same rule from PyTorch, on parameters of their own.
PLAIN = {
    "adam": lambda p, decay: torch.optim.Adam(p, lr=RATE, weight_decay=decay, fused=True),
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=RATE, weight_decay=decay, fused=True),
    "sgd": lambda p, decay: torch.optim.SGD(
        p, lr=RATE, weight_decay=decay, momentum=MOMENTUM, fused=True
    ),
    "adagrad": lambda p, decay: torch.optim.Adagrad(p, lr=RATE, weight_decay=decay, fused=True),
}


def stage(name: str, **options) -> Stage:
    return Stage(name=name, expert_lr_scale=1.0, **options)


def assembled(context: DistributedContext, *stages: Stage, **train) -> Assembly:
    config = RunConfig(
        model=MODEL,
        train=TrainConfig(
            learning_rate=RATE, momentum=MOMENTUM, stages=stages or (stage("all"),), **train
        ),
    )
    return assemble(config, build_task(MODEL, SCHEMA), context)


def step(assembly: Assembly, generator: torch.Generator, size: float = 1.0) -> dict[str, Tensor]:
    """One step on random gradients, which are returned."""
    given = {}
    for name, parameter in dense_parameters(task_of(assembly.model)).items():
        given[name] = torch.randn(parameter.shape, generator=generator) * size
        parameter.grad = given[name].clone()
    assembly.optimizers.stage_optimizer.step()
    return given


def enter(assembly: Assembly, entered: Stage) -> None:
    assembly.optimizers.enter(entered)
    assembly.optimizers.set_rates(StageSpan(stage=entered, start=0, stop=9), 0, decay=1.0)


def backbone(assembly: Assembly) -> dict[str, Tensor]:
    task = task_of(assembly.model)
    experts = expert_parameters(task)
    return {name: p for name, p in dense_parameters(task).items() if name not in experts}


def assert_moved(got: Tensor, before: Tensor, update: Tensor, name: str, terms: int = 1) -> None:
    """Check a step of SGD, but for rounding; the update is of so many ``terms``."""
    step = RATE * update.double()
    unit = of_sums(terms) * torch.finfo(torch.float32).eps
    assert_within(got, before.double() - step, unit * (before.abs() + step.abs()), name)


@pytest.mark.parametrize("name", PLAIN)
def test_each_optimizer_is_pytorchs_and_decays_matrices_only(alone, name):
    """Bit for bit, over steps; experts follow the same rule, layer by layer."""
    assembly = assembled(alone, optimizer=name, weight_decay=0.1)
    parameters = backbone(assembly)
    copies = {key: p.detach().clone().requires_grad_() for key, p in parameters.items()}
    matrices = [copy for copy in copies.values() if copy.dim() > 1]
    others = [copy for copy in copies.values() if copy.dim() < 2]
    assert matrices
    assert others
    plain = [PLAIN[name](matrices, 0.1), PLAIN[name](others, 0.0)]
    enter(assembly, stage("all"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = step(assembly, generator)
        for key, copy in copies.items():
            copy.grad = gradients[key]
        for optimizer in plain:
            optimizer.step()
    for key, copy in copies.items():
        assert torch.equal(parameters[key], copy), key


def test_a_stage_may_have_another_optimizer_whose_state_waits_for_it(alone):
    """Also decay and state: the run's own optimizer goes on where it stood."""
    stages = (
        stage("a"),
        stage("b", optimizer="sgd", weight_decay=0.5),
        stage("c", optimizer="adamw"),
    )
    assembly = assembled(alone, *(replace(s, steps=1) for s in stages))
    keys = {key.partition(".")[0] for key in assembly.optimizers.state_dict()["optimizer"]["state"]}
    assert keys == {"tables", "backbone", "experts", "backbone_sgd", "experts_sgd"}
    parameters = backbone(assembly)
    generator = torch.Generator().manual_seed(0)
    enter(assembly, stages[0])
    step(assembly, generator)
    state = assembly.optimizers.state_dict()["optimizer"]["state"]
    adam = {key: value["exp_avg"].clone() for key, value in state.items() if "exp_avg" in value}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    enter(assembly, stages[1])
    gradients = step(assembly, generator)
    for key, value in adam.items():
        assert torch.equal(state[key]["exp_avg"], value), key
    for key, parameter in parameters.items():
        decay = 0.5 if parameter.dim() > 1 else 0.0
        assert_moved(parameter, before[key], gradients[key] + decay * before[key], key)
    enter(assembly, stages[2])
    step(assembly, generator)
    for key, value in state.items():
        if key.startswith(("backbone.", "experts.")):
            assert value["step"] == 2, key  # AdamW went on from Adam's moments


def test_dense_gradients_are_clipped_as_one_vector(alone):
    assembly = assembled(alone, optimizer="sgd", max_grad_norm=0.5)
    enter(assembly, stage("all"))
    dense = dense_parameters(task_of(assembly.model))
    before = {key: p.detach().clone() for key, p in dense.items()}
    gradients = step(assembly, torch.Generator().manual_seed(0))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    found = assembly.optimizers.stage_optimizer.gradient_norm
    assert found is not None
    terms = sum(gradient.numel() for gradient in gradients.values())
    assert found.item() == rounded(norm, terms, torch.float32)
    for key, parameter in dense.items():
        assert_moved(parameter, before[key], gradients[key] * (0.5 / norm), key, terms)


def test_short_gradients_are_not_clipped(alone):
    assembly = assembled(alone, optimizer="sgd", max_grad_norm=1e6)
    enter(assembly, stage("all"))
    before = {key: p.detach().clone() for key, p in backbone(assembly).items()}
    gradients = step(assembly, torch.Generator().manual_seed(0))
    for key, parameter in backbone(assembly).items():
        assert_moved(parameter, before[key], gradients[key], key)


def test_what_does_not_learn_has_no_part_in_the_norm(alone):
    frozen = stage("experts", active_layers=1, train_backbone=False, train_tables=False)
    assembly = assembled(alone, frozen, max_grad_norm=0.5)
    enter(assembly, frozen)
    experts = expert_parameters(task_of(assembly.model))
    gradients = step(assembly, torch.Generator().manual_seed(0))
    total, terms = 0.0, 0
    for name in experts:
        part = gradients[name] if name.endswith("query_proj") else gradients[name][0]
        total += part.double().square().sum().item()
        terms += part.numel()
    found = assembly.optimizers.stage_optimizer.gradient_norm
    assert found is not None
    assert found.item() == rounded(math.sqrt(total), terms, torch.float32)


def test_the_state_of_another_process_is_taken_over(alone):
    """A state that is not the optimizers' own tensors is copied into them."""
    stages = (replace(stage("a"), steps=1), stage("b", optimizer="sgd"))
    first, second = (assembled(alone, *stages, precision="fp16") for _ in range(2))
    enter(first, stages[0])
    step(first, torch.Generator().manual_seed(0))
    want = first.optimizers.state_dict()
    second.optimizers.load_state_dict(deepcopy(want))
    got = second.optimizers.state_dict()
    assert got["optimizer"]["state"].keys() == want["optimizer"]["state"].keys()
    for name, tensors in want["optimizer"]["state"].items():
        if name.startswith("tables."):
            continue  # their gradients come from a backward pass, and there was none
        for key, tensor in tensors.items():
            assert torch.equal(got["optimizer"]["state"][name][key], tensor), (name, key)
            assert key != "step" or name.startswith(("backbone_sgd", "experts_sgd")) or tensor == 1
