"""load_base_checkpoint: what loads, and everything that would be lost, by name."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from torchrec_hilomoe.hilomoe import (
    fix_random_routing,
    HiLoMoEConfig,
    inject_hilomoe,
    inject_shared_router,
    load_base_checkpoint,
)
from torchrec_hilomoe.hilomoe.inject import expert_names

CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.up, self.out = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.up(self.norm(self.query(x))))


def injected(shared: bool) -> Host:
    model = Host()
    if shared:
        inject_shared_router(model, CONFIG, ["up", "out"], "query", query_width=4)
    else:
        inject_hilomoe(model, CONFIG, ["up", "out"])
    return model


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_base_is_the_checkpoint_s_and_the_experts_stay(shared, fixed):
    old, model = Host(), injected(shared)
    for buffer in old.buffers():
        buffer.add_(1)
    if fixed:
        fix_random_routing(model, seed=0)
    assert expert_names(model) == model.state_dict().keys() - old.state_dict().keys()
    experts = {name: model.state_dict()[name].clone() for name in expert_names(model)}
    load_base_checkpoint(model, old.state_dict())
    state = model.state_dict()
    for name, value in {**old.state_dict(), **experts}.items():
        assert torch.equal(state[name], value), name
    x = torch.randn(3, 6)
    assert torch.equal(model.eval()(x), old.eval()(x))


def test_all_that_is_wrong_is_listed_and_nothing_is_loaded():
    model, state = injected(False), Host().state_dict()
    state["up_layer.weight"] = state.pop("up.weight")
    state["out.weight"] = torch.zeros(1, 7)
    del state["norm.running_mean"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not of this model") as caught:
        load_base_checkpoint(model, state)
    for part in (
        "missing: norm.running_mean; up.weight.",
        "unexpected: up_layer.weight.",
        "reshaped: out.weight is (1, 7) in the checkpoint and (1, 5) in the model.",
        "seems to hold up_layer.weight as up.weight.",
        "Rename or drop them",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_experts_is_no_plain_one():
    with pytest.raises(ValueError, match=r"holds experts: out.expert_in, .*load_state_dict\(state"):
        load_base_checkpoint(injected(False), injected(False).state_dict())


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = injected(False)
    with pytest.raises(ValueError, match=r"query.weight, .* are on the meta device.*Build the mod"):
        load_base_checkpoint(model, Host().state_dict())


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match="already distributed: its root is a DataParallel"):
        load_base_checkpoint(DataParallel(injected(False)), Host().state_dict())


class Closed(torch.Tensor):
    """As sharded tensors are: not to be used like one that is all here."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("__getitem__", "copy_"):
            raise NotImplementedError(f"no {func.__name__} here")
        return super().__torch_function__(func, types, args, kwargs or {})


def int8(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.int8)


ODD = {
    "a value that is none": (
        lambda t: None,
        TypeError,
        r"out\.weight is a NoneType .* a tensor in",
    ),
    "a list": (lambda t: t.tolist(), TypeError, r"out\.weight is a list .*torch\.as_tensor"),
    "an array": (lambda t: t.numpy(), TypeError, r"out\.weight is a ndarray"),
    "meta": (lambda t: t.to("meta"), ValueError, r"out\.weight has no values .* on meta"),
    "lazy": (lambda t: nn.UninitializedParameter(), ValueError, r"out\.weight has no values"),
    "sparse": (lambda t: t.to_sparse(), ValueError, r"is torch.sparse_coo.*strided.*to_dense\(\)"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        ValueError,
        r"torch\.qint8 in the checkpoint and torch.strided, torch.float32 .*dequantize\(\)",
    ),
    "complex": (lambda t: t.cfloat(), ValueError, r"is torch.complex64 in .* and torch.float32 in"),
    "integers": (int8, ValueError, r"is torch.int8 in the checkpoint and torch.float32 in the mod"),
    "truth": (lambda t: t.bool(), ValueError, r"is torch.bool in the checkpoint and torch.float32"),
    "closed": (
        lambda t: t.as_subclass(Closed),
        ValueError,
        r"out\.weight is a Closed, of which no copy can be made \(no __getitem__ here\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quant:DeprecationWarning", "ignore:.*quant:UserWarning")
@pytest.mark.parametrize(("change", "error", "message"), ODD.values(), ids=ODD)
def test_what_cannot_be_copied_is_refused_before_anything_is(change, error, message):
    model, state = injected(False), dict(Host().state_dict())
    state["out.weight"] = change(state["out.weight"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=rf"load_base_checkpoint: .*{message}"):
        load_base_checkpoint(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"got a NoneType\. Give what state_dict\(\)"),
        ([("up.weight", torch.ones(5, 4))], "got a list"),
        ("old.pt", r"got a str\. Read it first: torch\.load\('old\.pt', weights_only=True\)"),
        (Path("old.pt"), r"got a \w*Path\. Read it first: torch\.load\('old\.pt', weights"),
        (Host(), r"got a Host\. Give its state_dict\(\)\."),
        ({**Host().state_dict(), 3: torch.ones(1)}, r"names of a state must be text, got 3\."),
    ],
    ids=["none", "list", "text", "path", "model", "number"],
)
def test_what_is_no_state_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        load_base_checkpoint(injected(False), state)


def test_a_state_in_a_checkpoint_is_pointed_to():
    with pytest.raises(ValueError, match=r"It seems to be state\['model'\]\. Rename or drop"):
        load_base_checkpoint(injected(False), {"model": Host().state_dict(), "step": 3})


def test_other_precisions_load():
    old, model = Host().double(), injected(False)
    load_base_checkpoint(model, old.state_dict())
    assert torch.equal(model.out.weight, old.out.weight.float())


def test_a_model_without_shapes_is_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    inject_hilomoe(model, CONFIG, ["1"])
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias of the model are not initialized"):
        load_base_checkpoint(model, nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)).state_dict())
