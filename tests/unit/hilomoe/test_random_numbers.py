"""Whoever draws random numbers beside experts draws what would be drawn without them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_same
from tests.helpers.towers import CONFIG
from torchrec_hilomoe import inject_hilomoe, inject_shared_router, InteractionProbe
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    fix_random_routing,
    record_routing,
    remove_hilomoe,
    routing_report,
    sites_of,
)

WIDTH = 6


class Host(nn.Module):
    """Two maps, and what could route them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Identity()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.first(self.query(x)))


def share(model: nn.Module, seed: int | None = None) -> None:
    inject_shared_router(model, CONFIG, ["first"], "query", WIDTH, seed=seed)


def inject(model: nn.Module, seed: int | None = None) -> None:
    inject_hilomoe(model, CONFIG, ["first"], seed=seed)


def fix(model: nn.Module) -> None:
    inject(model)
    fix_random_routing(model, seed=3)


def remove(model: nn.Module) -> None:
    inject(model)
    for site in sites_of(model).values():
        site.active_layers = 0
    remove_hilomoe(model)


def report(model: nn.Module) -> None:
    inject(model)
    with record_routing(model):
        model(torch.ones(9, WIDTH))
    routing_report(model)


def probe(model: nn.Module) -> None:
    listener = InteractionProbe(
        model, CONFIG, ["first"], "query", {"a": range(1), "b": range(1, 5)}, sketch=4
    )
    rows = torch.linspace(-1, 1, 256 * WIDTH).sin().reshape(256, WIDTH)
    for phase in (listener.fit, listener.judge):
        with phase():
            model(rows).square().sum().backward()
    listener.report()


def refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="matches none"):
        inject_hilomoe(model, CONFIG, ["first", "nowhere"], seed=5)


@pytest.mark.parametrize("act", [inject, share, fix, remove, report, probe, refused])
def test_the_host_draws_what_it_would_draw_without(act: Callable[[nn.Module], None]):
    drawn = []
    for do in (lambda model: None, act):
        model = Host()
        torch.manual_seed(7)
        torch.rand(3)
        do(model)
        drawn.append([torch.rand(5), torch.randn(20), torch.randperm(9)])
    assert_same(drawn[1], drawn[0])


def experts_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in expert_parameters(model).items()}


def started(act: Callable, host_seed: int, seed: int | None = None) -> dict[str, torch.Tensor]:
    model = Host()
    torch.manual_seed(host_seed)
    act(model, seed)
    return experts_of(model)


@pytest.mark.parametrize("act", [inject, share])
def test_experts_start_by_the_host_s_seed_or_their_own(act):
    keys = "hilomoe_router.expert_keys" if act is share else "first.expert_keys"
    for name in ("first.expert_in", keys):
        by_host, by_own = started(act, 1)[name], started(act, 1, seed=1)[name]
        assert torch.equal(by_host, started(act, 1)[name])
        assert not torch.equal(by_host, started(act, 2)[name])
        assert torch.equal(by_own, started(act, 2, seed=1)[name])
        assert not torch.equal(by_own, started(act, 1, seed=2)[name])
        assert torch.equal(by_own, by_host)


@pytest.mark.parametrize("seed", [None, 4])
def test_a_second_injection_into_a_model_starts_otherwise(seed):
    model = Host()
    inject(model, seed)
    inject_hilomoe(model, CONFIG, ["last"], seed=seed)
    first, last = (site.expert_in for site in sites_of(model).values())
    assert not torch.equal(first, last)


@pytest.mark.parametrize("seed", ["a", 1.5, True, 2**64])
@pytest.mark.parametrize("act", [inject, share, fix_random_routing])
def test_what_is_no_seed_is_refused(act: Callable, seed):
    model = Host()
    if act is fix_random_routing:
        inject(model)
    before, sites = torch.get_rng_state(), list(sites_of(model))
    with pytest.raises(ValueError, match=f"seed must be a whole number .* got {seed!r}. Give one"):
        act(model, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(sites_of(model)) == sites
    assert all(isinstance(p, nn.Parameter) for p in experts_of_sites(model))


def experts_of_sites(model: nn.Module) -> list[nn.Parameter]:
    return [p for site in sites_of(model).values() for p in site.routing_parameters().values()]


@pytest.mark.parametrize("act", [inject, share])
def test_any_whole_number_is_a_seed(act: Callable):
    for seed in (-1, 2**64 - 1, np.int64(3)):
        act(Host(), seed)


@pytest.mark.parametrize("act", [inject, share])
def test_experts_that_are_injected_in_inference_mode_can_learn(act: Callable):
    model = Host()
    with torch.inference_mode():
        act(model)
    model(torch.ones(9, WIDTH)).sum().backward()
    assert all(p.grad is not None for p in expert_parameters(model).values())
