"""inject_hilomoe and remove_hilomoe: what is kept, what is refused."""

import pytest
import torch
from torch import nn

from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    HiLoMoEConfig,
    HiLoMoELinear,
    inject_hilomoe,
    remove_hilomoe,
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
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
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
