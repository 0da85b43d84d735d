"""inject_hilomoe and remove_hilomoe: what is kept, what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from torchrec_hilomoe.backbones.base import HookPoint
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    fix_random_routing,
    HiLoMoEConfig,
    HiLoMoELinear,
    inject_hilomoe,
    inject_shared_router,
    remove_hilomoe,
    routers_of,
    sites_of,
)

CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4)


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.Linear(5, 1))


def test_keeps_parameters_mode_dtype_and_outputs():
    model = tower().double().eval()
    before = dict(model.named_parameters())
    x = torch.randn(9, 6, dtype=torch.float64)
    want = model(x)
    assert inject_hilomoe(model, CONFIG, sites=["0", "[23]"]) == ["0", "2", "3"]
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == set(expert_parameters(model))
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(x), want)
    assert torch.equal(model.train()(x), want)


def test_an_old_checkpoint_loads():
    old, model = tower(), tower()
    inject_hilomoe(model, CONFIG, sites=["0"])
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert (set(missing), unexpected) == (set(expert_parameters(model)), [])
    x = torch.randn(3, 6)
    assert torch.equal(model(x), old(x))


def test_only_experts_train_when_asked():
    model = tower()
    inject_hilomoe(model, CONFIG, sites=["0"])
    model.requires_grad_(False)
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(True)
    model(torch.randn(9, 6)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"0.expert_in", "0.expert_out", "0.expert_keys"}


def test_meta_model_stays_on_meta():
    with torch.device("meta"):
        model = tower()
    inject_hilomoe(model, CONFIG, sites=["0"])
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_remove_restores_the_plain_model():
    model = tower()
    plain = dict(model.named_parameters())
    inject_hilomoe(model, CONFIG, sites=["0", "2"])
    with pytest.raises(ValueError, match=r"active_layers must be 0 .*'0': 2, '2': 2.*Set active"):
        remove_hilomoe(model)
    for site in sites_of(model).values():
        site.active_layers = 0
    assert remove_hilomoe(model) == ["0", "2"]
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    assert dict(model.named_parameters()) == plain


def test_refuses_a_pattern_without_a_match():
    with pytest.raises(ValueError, match=r"'head' matches none .*: 0, 2, 3\. Write a pattern"):
        inject_hilomoe(tower(), CONFIG, sites=["0", "head"])


def test_refuses_a_site_twice():
    with pytest.raises(ValueError, match=r"'0' is matched twice, by '0' and by '\*'.*0, 2, 3"):
        inject_hilomoe(tower(), CONFIG, sites=["0", "*"])
    model = tower()
    inject_hilomoe(model, CONFIG, sites=["0"])
    with pytest.raises(ValueError, match=r"'\*' matches '0', which carries experts already.*2, 3"):
        inject_hilomoe(model, CONFIG, sites=["*"])


def test_refuses_shared_maps_and_tied_weights():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"'b' is shared: its weight is used as a.weight and b.w"):
        inject_hilomoe(model, CONFIG, sites=["b"])
    linear = nn.Linear(4, 4)
    for name in ("a", "b"):  # the second is the same module, so the model lists it once
        message = rf"'{name}' is shared: its weight is used as a.weight and b.weight"
        with pytest.raises(ValueError, match=message):
            inject_hilomoe(nn.ModuleDict({"a": linear, "b": linear}), CONFIG, sites=[name])


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_refuses_a_map_with_hooks(kind):
    model = tower()
    getattr(model[0], f"register_{kind}_hook")(lambda *_: None)
    name = kind.removeprefix("full_").replace("_", "-")
    with pytest.raises(ValueError, match=rf"'0' has 1 {name} hook"):
        inject_hilomoe(model, CONFIG, sites=["0"])


@pytest.mark.parametrize("sites", ["0", "*", [], ()], ids=str)
def test_refuses_what_is_no_list_of_patterns(sites):
    """A text would be a pattern a letter; nothing would be experts nowhere, without a word."""
    model = tower()
    with pytest.raises(ValueError, match=r"sites must be a list of at least one name.*: 0, 2, 3"):
        inject_hilomoe(model, CONFIG, sites=sites)
    assert not sites_of(model)


def test_leaves_the_model_alone_when_it_refuses():
    model = tower()
    with pytest.raises(ValueError, match="matches none"):
        inject_hilomoe(model, CONFIG, sites=["0", "head"])
    assert not any(isinstance(m, HiLoMoELinear) for m in model.modules())


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.up, self.last = HookPoint(), nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.query(x)))


def host(shared: bool = False, **options) -> Host:
    model, config = Host(), HiLoMoEConfig(num_experts=4, **options)
    if shared:
        inject_shared_router(model, config, ["up", "last"], "query", query_width=6)
    else:
        inject_hilomoe(model, config, sites=["up", "last"])
    return model


def routers(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in tower.named_buffers() if name.endswith(("keys", "query_proj"))}


@pytest.mark.parametrize("shared", [False, True])
def test_is_fixed_by_the_seed_and_cannot_be_made_to_train(shared):
    towers = [host(shared, query_dim=3) for _ in range(2)]
    for tower in towers:
        fix_random_routing(tower, seed=7)
    one, other = towers
    before = {name: keys.clone() for name, keys in routers(one).items()}
    assert len(before) == (2 if shared else 4)
    one.requires_grad_(True)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        one(torch.randn(9, 6)).sum().backward()
        optimizer.step()
    for name, keys in routers(one).items():
        assert torch.equal(keys, before[name])
        assert torch.equal(keys, routers(other)[name])
    assert not [name for name in expert_parameters(one) if name.endswith(("keys", "query_proj"))]
    assert sites_of(one)["up"].expert_in.grad is not None


def test_refuses_tied_keys():
    with pytest.raises(ValueError, match=r"'up' has tie_keys = True.*tie_keys=False"):
        fix_random_routing(host(tie_keys=True), seed=0)


def test_a_router_is_the_model_s_whatever_the_sites():
    """Its parameters keep their names, and its fresh values, when a site joins."""
    states = []
    for sites in (["up"], ["up", "last"]):
        torch.manual_seed(0)
        model = Host()
        inject_shared_router(model, HiLoMoEConfig(query_dim=3), sites, "query", query_width=6)
        states.append(model.state_dict())
        assert list(routers_of(model)) == ["hilomoe_router"]
    few, more = states
    assert [name for name in few if "router" in name] == [
        "hilomoe_router.expert_keys",
        "hilomoe_router.query_proj",
    ]
    assert few.keys() < more.keys()


def test_a_seed_starts_experts_alike_whoever_routes_them():
    models = []
    for shared in (False, True):
        torch.manual_seed(0)
        models.append(host(shared, query_dim=3))
    alone, together = ({n: s.expert_in for n, s in sites_of(m).items()} for m in models)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_several_routers_have_names():
    model, config = Host(), HiLoMoEConfig(num_layers=2, num_experts=4)
    inject_shared_router(model, config, ["up"], "query", query_width=6)
    with pytest.raises(
        ValueError, match=r"model has a 'hilomoe_router' already\. .* name='hilomoe"
    ):
        inject_shared_router(model, config, ["last"], "up", query_width=4)
    inject_shared_router(model, config, ["last"], "up", query_width=4, name="by_up")
    assert list(routers_of(model)) == ["hilomoe_router", "by_up"]
    assert sites_of(model)["last"].router is model.get_submodule("by_up")
    model(torch.randn(5, 6)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_sequential_cannot_hold_a_router():
    with pytest.raises(ValueError, match=r"run the router as its last layer\. Make it a child of"):
        inject_shared_router(tower(), HiLoMoEConfig(), ["*"], "0", query_width=6)


def share(model: Any, config: Any, sites: list[str]) -> list[str]:
    return inject_shared_router(model, config, sites, "0", 6)


@pytest.mark.parametrize("inject", [inject_hilomoe, share])
def test_what_is_no_model_or_configuration_is_refused(inject):
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got a list"):
        inject([tower()], CONFIG, ["0"])
    model = tower()
    for config in (None, {"num_layers": 2}):
        with pytest.raises(ValueError, match="config must be a HiLoMoEConfig, got a"):
            inject(model, config, ["0"])
    assert not sites_of(model)
