"""A host is told where its auxiliary losses may not be as strong as it means them to be."""

import pytest
import torch
from torch import nn

from tests.helpers.towers import CONFIG
from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import set_auxiliary_loss_scale, sites_of

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
