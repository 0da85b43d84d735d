"""A host is told where its auxiliary losses may not be as strong as it means them to be."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers.towers import CONFIG
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import fix_random_routing, set_auxiliary_loss_scale, sites_of
from torchrec_hilomoe.hilomoe.strength_watch import MOST

SILENT = HiLoMoEConfig(num_layers=2, num_experts=4, balance_weight=0.0, z_weight=0.0)


class Tasks(nn.Module):
    """Two heads over a bottom with experts."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Identity()
        self.bottom = nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(2))

    def forward(self, x):
        hidden = self.bottom(self.query(x)).tanh()
        return {"tasks": [head(hidden) for head in self.heads]}


def build(config: HiLoMoEConfig = CONFIG, shared: bool = False) -> Tasks:
    model = Tasks()
    if shared:
        inject_shared_router(model, config, ["bottom"], "query", 6)
    else:
        inject_hilomoe(model, config, ["bottom"])
    return model


def losses(model: nn.Module) -> list[torch.Tensor]:
    return [logits.square().mean() for logits in model(torch.randn(4, 6))["tasks"]]


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int) -> None:
    for _ in range(parts):
        (torch.stack(losses(model)).sum() / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def each_task(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    first, second = losses(model)
    first.backward(retain_graph=True)
    second.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: nn.Module, *parts: int) -> None:
    """Train a step for each number, of so many micro-batches; 0 is a backward a task."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in parts:
        if number:
            accumulate(model, optimizer, number)
        else:
            each_task(model, optimizer)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("parts", "passes"), [((3, 3), 3), ((0, 0), 2)])
def test_several_backwards_a_step_are_told_once_with_the_call_to_make(parts, passes, shared):
    model = build(shared=shared)
    message = rf"{passes} backward passes run .* set_auxiliary_loss_scale\(model, 1 / {passes}\)"
    with pytest.warns(UserWarning, match=message) as caught:
        trained(model, *parts)
    assert len(caught) == 1
    trained(model, *parts)


@pytest.mark.parametrize("scale", [1 / 3, 1.0])
def test_a_host_that_has_said_its_scale_is_told_nothing(scale):
    model = build()
    set_auxiliary_loss_scale(model, scale)
    trained(model, 3, 3, 3)


def test_said_after_the_first_step_is_soon_enough():
    model = build()
    trained(model, 3)
    set_auxiliary_loss_scale(model, 1 / 3)
    trained(model, 3, 3)


@pytest.mark.parametrize("parts", [(1, 1, 1), (3, 2, 3, 2), (1, 3)])
def test_one_backward_a_step_and_odd_ends_are_nothing_to_say(parts):
    trained(build(), *parts)


def test_forwards_of_one_backward_and_optimizers_of_one_step_are_nothing_to_say():
    model = build()
    dense = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    bottom = [torch.optim.SGD([p], lr=0.1) for p in model.bottom.parameters()]
    for _ in range(4):
        torch.stack(losses(model) + losses(model)).sum().backward()
        for optimizer in (dense, *bottom):
            optimizer.step()
            optimizer.zero_grad()


def test_without_losses_there_is_nothing_to_be_strong():
    trained(build(SILENT), 3, 3)
    model = build()
    for site in sites_of(model).values():
        site.active_layers = 0
        for parameter in site.expert_parameters().values():
            parameter.requires_grad_(False)
    trained(model, 3, 3)


def under_autocast(model: nn.Module, dtype: torch.dtype) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            loss = torch.stack(losses(model)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_half_precision_that_a_scaler_needs_is_told_once():
    with pytest.warns(UserWarning, match=r"float16, .*\(model, scaler.get_scale\(\)\)") as caught:
        under_autocast(build(), torch.float16)
    assert len(caught) == 1
    under_autocast(build(), torch.bfloat16)
    model = build()
    set_auxiliary_loss_scale(model, 2.0**16)
    under_autocast(model, torch.float16)


def test_a_scale_that_is_told_between_forward_and_backward_is_soon_enough():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = torch.stack(losses(model)).sum()
        set_auxiliary_loss_scale(model, 4.0)
        (4 * loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def backward(model: nn.Module) -> torch.Tensor:
    loss = torch.stack(losses(model)).sum()
    loss.backward()
    return loss


def closures(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure)


def thrown_away(model: nn.Module, set_to_none: bool = True) -> None:
    """As where a step is skipped, or weights are perturbed for a second pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad(set_to_none)
    backward(model)
    loss = torch.stack(losses(model)).sum()
    optimizer.zero_grad(set_to_none)
    loss.backward()
    optimizer.step()


def thrown_away_as_zeros(model: nn.Module) -> None:
    thrown_away(model, set_to_none=False)


def looked_at(model: nn.Module) -> None:
    """As where gradients of inputs, or of each task, are measured."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = torch.stack(losses(model)).sum()
    learned = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [closures, thrown_away, thrown_away_as_zeros, looked_at])
def test_passes_that_do_not_add_up_are_nothing_to_say(step: Callable, shared):
    model = build(shared=shared)
    for _ in range(4):
        step(model)


@pytest.mark.parametrize("tied", [False, True])
def test_routers_that_do_not_learn_have_no_losses(tied):
    model = build(HiLoMoEConfig(num_layers=2, num_experts=4, tie_keys=tied))
    for site in sites_of(model).values():
        for parameter in site.expert_parameters().values():
            parameter.requires_grad_(False)
    trained(model, 3, 3)
    under_autocast(model, torch.float16)
    if not tied:
        model = build()
        fix_random_routing(model, seed=0)
        trained(model, 3, 3)


def test_tied_keys_are_told():
    with pytest.warns(UserWarning, match="3 backward passes"):
        trained(build(HiLoMoEConfig(num_layers=2, num_experts=4, tie_keys=True)), 3, 3)


def test_tasks_with_sites_of_their_own_add_each_loss_once():
    model = Tasks()
    inject_hilomoe(model, CONFIG, ["heads.*"])
    trained(model, 0, 0, 0)


def test_listening_is_bounded_and_leaves_no_trace_on_copies():
    model = build()
    backward(model)
    keys = model.bottom.expert_keys
    assert keys._post_accumulate_grad_hooks
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not again.bottom.expert_keys._post_accumulate_grad_hooks
        with pytest.warns(UserWarning, match="3 backward passes"):
            trained(again, 3, 3)
    for _ in range(MOST):
        backward(model)
    assert not keys._post_accumulate_grad_hooks
