"""Adam for each expert layer alone, frozen to the bit, at the rate of the stage and the step."""

import pytest
import torch
from torch import Tensor

from tests.helpers.models import dense_parameters, task_of
from tests.helpers.rounding import rounded
from torchrec_hilomoe.hilomoe.inject import expert_parameters
from torchrec_hilomoe.training.assemble import Assembly
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer
from torchrec_hilomoe.training.optimizers.dense import ExpertLayers
from torchrec_hilomoe.training.stages import Stage, StageSpan

LAYERS = 2
WARMUP = Stage(name="w", active_layers=0)
FIRST = Stage(name="1", active_layers=1, train_backbone=False, train_tables=False)
SECOND = Stage(name="2", active_layers=2, train_backbone=False, train_tables=False)
SECOND_ALONE = Stage(name="2 alone", learning_layers=(2,), train_backbone=False)
ALL = Stage(name="all")


def give_random_gradients(assembly: Assembly) -> None:
    """A gradient for every dense parameter, of whatever is frozen too."""
    for parameter in dense_parameters(task_of(assembly.model)).values():
        parameter.grad = torch.randn_like(parameter)


def dense_state(optimizers: OptimizersContainer) -> dict[str, Tensor]:
    """A copy of every state tensor of the dense optimizers."""
    return {
        f"{key}/{name}": tensor.clone()
        for key, entry in optimizers.state_dict()["optimizer"]["state"].items()
        if not key.startswith("tables.")
        for name, tensor in entry.items()
    }


def layers_of(name: str) -> tuple[int | None, ...]:
    """The optimizer views of an expert parameter: one a layer, or one for all of them."""
    return (None,) if name.endswith("query_proj") else tuple(range(1, LAYERS + 1))


def layer_of(stack: Tensor, layer: int | None) -> Tensor:
    return stack if layer is None else stack[layer - 1]


def test_every_expert_layer_learns_as_if_it_were_a_parameter_of_its_own(assembly):
    """Bit for bit, through stages, what Adam does on one separate parameter a layer."""
    optimizers, experts = assembly.optimizers, expert_parameters(task_of(assembly.model))
    separate = {
        (name, layer): torch.nn.Parameter(layer_of(stack.detach(), layer).clone())
        for name, stack in experts.items()
        for layer in layers_of(name)
    }
    adams = {key: torch.optim.Adam([own], fused=True) for key, own in separate.items()}
    learning = {WARMUP: (), FIRST: (1,), SECOND: (1, 2), SECOND_ALONE: (2,), ALL: (1, 2)}
    for step, stage in enumerate([FIRST] * 3 + [SECOND] * 2 + [WARMUP, SECOND_ALONE, ALL, ALL]):
        decay = 1 - step / 9
        optimizers.enter(stage)
        optimizers.set_rates(StageSpan(stage=stage, start=0, stop=9), step, decay)
        give_random_gradients(assembly)
        for (name, layer), own in separate.items():
            gradient = experts[name].grad
            assert gradient is not None
            if learning[stage] if layer is None else layer in learning[stage]:
                own.grad = layer_of(gradient, layer).clone()
                adams[name, layer].param_groups[0]["lr"] = 1e-3 * stage.expert_lr_scale * decay
                adams[name, layer].step()
        optimizers.stage_optimizer.step()
    state = optimizers.state_dict()["optimizer"]["state"]
    for (name, layer), own in separate.items():
        assert torch.equal(layer_of(experts[name], layer), own), (name, layer)
        key = f"experts.{name}" if layer is None else f"experts.{name}.{layer}"
        for entry, tensor in adams[name, layer].state[own].items():
            assert torch.equal(state[key][entry], tensor), (name, layer, entry)


def test_a_frozen_layer_and_its_state_keep_every_bit(assembly):
    optimizers, experts = assembly.optimizers, expert_parameters(task_of(assembly.model))
    optimizers.enter(SECOND)
    give_random_gradients(assembly)
    optimizers.stage_optimizer.step()  # now layer 1 has momentum, which would move it by itself
    optimizers.enter(SECOND_ALONE)
    before = {name: parameter.detach().clone() for name, parameter in experts.items()}
    state_before = dense_state(optimizers)
    give_random_gradients(assembly)
    optimizers.stage_optimizer.step()
    state_after = dense_state(optimizers)
    stacked = [name for name in experts if not name.endswith("query_proj")]
    for name in stacked:
        assert torch.equal(experts[name][0], before[name][0]), name
        assert not torch.equal(experts[name][1], before[name][1]), name
    for key, tensor in state_after.items():
        if key.startswith("experts.") and "query_proj" not in key:
            frozen = ".1/" in key
            assert torch.equal(tensor, state_before[key]) == frozen, key


def test_a_boundary_forgets_gradients_so_that_what_was_frozen_stays(assembly):
    optimizers, task = assembly.optimizers, task_of(assembly.model)
    optimizers.enter(ALL)
    give_random_gradients(assembly)
    optimizers.stage_optimizer.step()
    give_random_gradients(assembly)
    optimizers.enter(FIRST)  # between backward and step nothing is kept
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    state_before = dense_state(optimizers)
    optimizers.stage_optimizer.step()
    for name, parameter in task.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]), name
    for key, tensor in dense_state(optimizers).items():
        assert torch.equal(tensor, state_before[key]), key


def test_state_exists_before_the_first_step_and_counts_none(assembly):
    """A checkpoint then has the same keys at every step, and none is dropped when it is loaded."""
    state = dense_state(assembly.optimizers)
    parameters = list(dense_parameters(task_of(assembly.model)).values())
    views = ExpertLayers(expert_parameters(task_of(assembly.model))).views
    keys = len(parameters) - len(expert_parameters(task_of(assembly.model))) + len(views)
    assert len(state) == 3 * keys  # step, exp_avg, exp_avg_sq
    assert not any(tensor.any() for tensor in state.values())
    before = [parameter.detach().clone() for parameter in parameters]
    assembly.optimizers.stage_optimizer.zero_grad()
    assembly.optimizers.stage_optimizer.step()
    assert all(map(torch.equal, parameters, before))


def test_views_share_the_memory_of_the_stack():
    stack = torch.nn.Parameter(torch.zeros(3, 2))
    layers = ExpertLayers({"site.expert_in": stack, "site.query_proj": torch.nn.Parameter(stack)})
    assert set(layers.views) == {
        "site.expert_in.1",
        "site.expert_in.2",
        "site.expert_in.3",
        "site.query_proj",
    }
    with torch.no_grad():
        layers.views["site.expert_in.2"].fill_(7.0)
    assert stack.tolist() == [[0, 0], [7, 7], [0, 0]]


@pytest.mark.parametrize(
    ("stage", "learning"),
    [
        (WARMUP, set()),
        (FIRST, {1}),
        (SECOND, {1, 2}),
        (SECOND_ALONE, {2}),
        (ALL, {1, 2, 3}),
        (Stage(name="none", learning_layers=()), set()),
    ],
)
def test_which_layers_a_stage_lets_learn(stage, learning):
    layers = ExpertLayers({"site.expert_in": torch.nn.Parameter(torch.zeros(3, 2))})
    layers.learn(stage)
    assert layers.learning == learning


def rates(optimizers: OptimizersContainer) -> dict[str, float]:
    """The one rate that all groups of an optimizer have."""
    found = {}
    for name, optimizer in optimizers.combined.optimizers:
        (found[name],) = {group["lr"] for group in optimizer.param_groups}
    return found


def test_keys_have_a_factor_of_their_own(assembly):
    """What routes, the keys of each layer and a projection; not what the experts compute with."""
    stage = Stage(name="s", expert_lr_scale=2.0, key_lr_scale=4.0)
    assembly.optimizers.set_rates(StageSpan(stage=stage, start=0, stop=9), 0, decay=1.0)
    (experts,) = (it for name, it in assembly.optimizers.combined.optimizers if name == "experts")
    found = {
        name: group["lr"]
        for name, parameter in experts.params.items()
        for group in experts.param_groups
        if any(it is parameter for it in group["params"])
    }
    assert len(found) == len(experts.params)
    for name, rate in found.items():
        routes = "expert_keys" in name or name.endswith("query_proj")
        assert rate == rounded(1e-3 * 2.0 * (4.0 if routes else 1.0)), name
    assert len(set(found.values())) == 2


def test_rates_are_those_of_the_stage_its_warm_up_and_the_decay(assembly):
    optimizers = assembly.optimizers  # built with 1e-3 for dense parameters, 0.05 for tables
    stage = Stage(name="s", lr_scale=0.5, expert_lr_scale=3.0, warmup_steps=4)
    span = StageSpan(stage=stage, start=10, stop=90)
    for step, factor in [(10, 0.25), (12, 0.75), (13, 1.0), (60, 1.0)]:
        optimizers.set_rates(span, step, decay=0.8)
        backbone = 1e-3 * 0.5 * factor * 0.8
        assert optimizers.rate == rounded(backbone)
        assert rates(optimizers) == {
            "tables": rounded(0.05 * 0.5 * factor * 0.8),
            "backbone": rounded(backbone),
            "experts": rounded(1e-3 * 3.0 * factor * 0.8),
        }
