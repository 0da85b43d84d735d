"""The smallest hosts whose stages a driver runs, and their loop."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from tests.helpers.towers import CONFIG, tower
from torchrec_hilomoe import inject_hilomoe, Stage, StageDriver, StageSchedule
from torchrec_hilomoe.training.optimizers.host import Factory

ONE = StageSchedule(stages=(Stage(name="all", expert_lr_scale=1.0),))


def site(norm: bool = False) -> nn.Sequential:
    """The smallest host with experts, and with batch norm."""
    model = tower()
    if norm:
        model.insert(1, nn.BatchNorm1d(5))
    inject_hilomoe(model, CONFIG, sites=["0"])
    return model


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.01)


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=rng), torch.rand(8, 1, generator=rng)


def steps(driver: StageDriver, count: int) -> Iterator[int]:
    """Train a tower for some steps; yields each, once it is begun."""
    for _ in range(count):
        driver.begin_step()
        yield driver.step
        x, y = rows(driver.step)
        driver.optimizer.zero_grad()
        bce(driver.model(x), y).backward()
        driver.optimizer.step()
        driver.end_step()


def run(driver: StageDriver, count: int) -> dict[str, torch.Tensor]:
    for _ in steps(driver, count):
        pass
    return copy.deepcopy(dict(driver.model.state_dict()))


def in_three_stages(done: int = 0, optimizer: Factory = adam) -> StageDriver:
    """A driver of a tower whose stages compute one layer, both, and none, after some steps."""
    torch.manual_seed(1)
    stages = (
        Stage(name="one", steps=2, active_layers=1),
        Stage(name="both", steps=4, expert_lr_scale=1.0),
        Stage(name="none", active_layers=0),
    )
    driver = StageDriver(site(), StageSchedule(stages=stages), optimizer, total_steps=10)
    run(driver, done)
    return driver
