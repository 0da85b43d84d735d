"""Sites with a shared router that activation checkpointing runs again, whatever ran in between."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, Tensor
from torch.utils.checkpoint import checkpoint

from tests.helpers.towers import CONFIG
from torchrec_hilomoe.hilomoe import inject_shared_router, SampleRouter, sites_of


class Host(nn.Module):
    """A query, and two sites behind it; ``parts`` says what is checkpointed, apart or as one."""

    def __init__(self, parts: str, reentrant: bool = False, learned_query: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Sequential(nn.Linear(8, 8)) if learned_query else Same()
        self.top = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
        self.again: Callable[..., Tensor] = partial(checkpoint, use_reentrant=reentrant)
        self.parts = parts
        inject_shared_router(self, CONFIG, ["top.*"], "query", query_width=8)
        with torch.no_grad():
            for site in sites_of(self).values():
                site.expert_out.normal_()

    def body(self, x: Tensor) -> Tensor:
        return self.top(self.query(x))

    def forward(self, x: Tensor) -> Tensor:
        match self.parts:
            case "sites":
                return self.again(self.top, self.query(x))
            case "each site":
                return self.again(self.top[2], self.again(self.top[:2], self.query(x)))
            case "query":
                return self.top(self.again(self.query, x))
            case "query and sites, apart":
                return self.again(self.top, self.again(self.query, x))
            case "query and sites":
                return self.again(self.body, x)
            case "nested":
                return self.again(lambda x: self.again(self.top, self.query(x)), x)
        return self.body(x)


# PyTorch says so of every part that is run with use_reentrant=True under no_grad.
told = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


PARTS = ["sites", "each site", "query", "query and sites, apart", "query and sites", "nested"]


def one_after_the_other(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    for rows in (x, y):
        loss = run(rows).sum()
        loss.backward()


def scored_in_between(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    loss = run(x).sum()
    with torch.no_grad():
        run(y)
    loss.backward()


def another_that_is_kept(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    loss, kept = run(x).sum(), run(y)
    loss.backward()
    del kept


def a_second_backward(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    loss = run(x).sum()
    loss.backward(retain_graph=True)
    kept = run(y)
    loss.backward()
    del kept


def two_in_one_loss(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    (run(x).sum() - run(y).square().sum()).backward()


def the_first_one_last(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    first, second = run(x).sum(), run(y).square().sum()
    second.backward()
    first.backward()


LOOPS = [
    one_after_the_other,
    scored_in_between,
    another_that_is_kept,
    a_second_backward,
    two_in_one_loss,
    the_first_one_last,
]


def gradients(model: nn.Module, loop: Callable, run: Callable | None = None) -> list[Tensor | None]:
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(9, 8, generator=rng).requires_grad_() for _ in range(2))
    loop(run or model, x, y)
    return [t.grad for t in (x, y, *model.parameters())]


def assert_alike(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("parts", PARTS)
def test_gradients_are_those_without_checkpointing(parts, loop):
    assert_alike(gradients(Host(parts), loop), gradients(Host("none"), loop))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("loop", [scored_in_between, two_in_one_loss])
def test_compiled_sites_are_run_again(loop):
    """As one that compiles each block, and checkpoints it after that, has them."""

    class Compiled(Host):
        def forward(self, x: Tensor) -> Tensor:
            return self.again(top, self.query(x))

    model = Compiled("sites")
    if loop is scored_in_between and torch.__version__.startswith("2.14."):
        pytest.skip("torch 2.14 recomputes by other graphs than it ran, and refuses them")
    top = torch.compile(model.top, backend="aot_eager")
    assert_alike(gradients(model, loop), gradients(Host("none"), loop))


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_is_run_again(reentrant, loop):
    model = Host("none")
    again = partial(checkpoint, model, use_reentrant=reentrant)
    assert_alike(gradients(model, loop, again), gradients(Host("none"), loop))


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("parts", ["query and sites", "nested"])
def test_the_old_checkpointing_of_query_and_sites(parts, loop):
    got = gradients(Host(parts, True, learned_query=False), loop)
    assert_alike(got, gradients(Host("none", learned_query=False), loop))


@told
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("parts", ["query", "query and sites, apart"])
def test_the_old_checkpointing_of_a_query_apart_is_refused(parts, loop):
    with pytest.raises(ValueError, match=r"use_reentrant=True recomputes the query.*=False, or"):
        gradients(Host(parts, True), loop)


@told
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_old_checkpointing_of_each_site_is_refused(loop):
    """The first site's own backward goes through the gates and frees them."""
    with pytest.raises(ValueError, match=r"none is left, .*use_reentrant=False"):
        gradients(Host("each site", True, learned_query=False), loop)


@dataclass
class Output:
    logits: Tensor


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("kind", [Output, Slotted, lambda y: SimpleNamespace(logits=y)])
def test_outputs_of_any_kind_are_known(kind, loop):
    class Wrapped(Host):
        def forward(self, x: Tensor) -> Any:
            return kind(super().forward(x))

    model = Wrapped("sites")
    got = gradients(model, loop, lambda x: model(x).logits)
    assert_alike(got, gradients(Host("none"), loop))


def test_what_cannot_be_known_is_refused():
    """No node of the graph of an output that hides its tensors says whose backward it is."""

    class Hidden(Host):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return lambda: y

    model = Hidden("sites")
    gradients(model, one_after_the_other, lambda x: model(x)())  # there is but one each time
    with pytest.raises(ValueError, match=r"2 forwards are left, where it must be one\. Call back"):
        gradients(model, two_in_one_loss, lambda x: model(x)())


def test_frozen_routers_are_known_by_the_outputs():
    wanted, got = Host("none"), Host("sites")
    for model in (wanted, got):
        model.hilomoe_router.requires_grad_(False)
        model.query.requires_grad_(False)
    assert_alike(gradients(got, the_first_one_last), gradients(wanted, the_first_one_last))


def test_no_forward_outlives_its_graph():
    model = Host("sites")
    loss = model(torch.randn(9, 8)).sum()
    router = model.hilomoe_router
    assert isinstance(router, SampleRouter)
    kept = weakref.ref(router.routing())
    loss.backward()
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 8))
    del loss
    assert kept() is None
    gone = weakref.ref(router)
    model(torch.randn(9, 8)).sum()
    del model, router
    gc.collect()
    assert gone() is None
