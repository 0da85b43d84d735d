"""What PyTorch does with whole models: copies, averages, swaps and quantization."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers.rounding import assert_same, assert_within, rounding_of
from tests.helpers.towers import CONFIG
from torchrec_hilomoe import HiLoMoELinear, inject_hilomoe, inject_shared_router
from torchrec_hilomoe.hilomoe import expert_parameters, remove_hilomoe, sites_of

WIDTH, DECAY = 6, 0.5


class Host(nn.Module):
    """A site that is routed by samples, and one that routes its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.last(self.first(self.query(x)).tanh())


def grown() -> Host:
    torch.manual_seed(0)
    model = Host()
    inject_hilomoe(model, CONFIG, ["last"])
    inject_shared_router(model, CONFIG, ["first"], "query", WIDTH)
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    return model


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(rows(step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_computes_and_trains_alike_and_by_itself(copied):
    model = grown()
    model(rows()).sum().backward()  # a pass has left its routing behind
    model.zero_grad()
    other = copied(model)
    train(other)
    assert_same(model.state_dict(), grown().state_dict())
    train(model)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(other(rows()), model(rows()))


def test_a_moving_average_computes_with_the_averaged_parameters():
    model = grown()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    before = {name: p.detach().clone() for name, p in expert_parameters(model).items()}
    train(model, steps=1)
    averaged.update_parameters(model)
    for name, parameter in expert_parameters(averaged.module).items():
        moved = expert_parameters(model)[name].detach()
        assert_same(parameter, torch.lerp(before[name], moved, 1 - DECAY))
    same = copy.deepcopy(model)
    same.load_state_dict(averaged.module.state_dict())
    assert_same(averaged(rows()), same(rows()))


def test_parameters_that_are_swapped_are_those_that_compute():
    model, other = grown(), grown()
    for name, parameter in expert_parameters(other).items():
        nn.init.normal_(parameter)
        torch.utils.swap_tensors(expert_parameters(model)[name], nn.Parameter(parameter.clone()))
    assert_same(model(rows()), other(rows()))


def test_conversion_may_swap_parameters():
    model = grown()
    own = expert_parameters(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert expert_parameters(model) == own  # the very parameters, which an optimizer may hold
    assert_same(model(rows().double()), grown().double()(rows().double()))
    train(model.float())


def test_dynamic_quantization_leaves_sites_as_they_are():
    model = grown().eval()
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own, of its way to torchao
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        found = quantized(rows())
    assert type(quantized.query) is not nn.Linear
    assert all(type(site) is HiLoMoELinear for site in (quantized.first, quantized.last))
    assert_same(dict(quantized.first.named_parameters()), dict(model.first.named_parameters()))
    for collected in (False, True):  # the query that was replaced may be there for a while
        if collected:
            gc.collect()
        assert_same(found, copy.deepcopy(quantized)(rows()))
    assert found.isfinite().all()


def test_base_maps_are_quantized_where_sites_are_taken_off():
    model = grown().eval()
    for site in sites_of(model).values():
        site.active_layers = 0
    remove_hilomoe(model)
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(type(module) is nn.Linear for module in quantized.modules())


def test_gradients_of_a_function_of_the_parameters():
    model = grown()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def lost(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (rows(),)).square().mean()

    found = torch.func.grad(lost)(parameters)
    model(rows()).square().mean().backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bound = rounding_of(lambda model: model(rows()), model)
    assert found.keys() == want.keys()
    assert_within(found, want, float(bound))
