"""Hosts in which experts would be skipped, lost or left untrained: refused, or told by name."""

import copy
import gc
import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.helpers.towers import CONFIG, tower
from torchrec_hilomoe.hilomoe import (
    expert_parameters,
    fix_random_routing,
    HiLoMoELinear,
    inject_hilomoe,
    inject_shared_router,
    remove_hilomoe,
    sites_of,
)


class Encoded(nn.Module):
    """A ranker with one of PyTorch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean(dim=1))


class Attending(nn.Module):
    """Attention whose output projection somebody has made a plain linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x)[0])


class Reading(nn.Module):
    """Reads the weight of a child that it never calls; in evaluation only, if asked."""

    def __init__(self, while_training: bool) -> None:
        super().__init__()
        self.while_training = while_training
        self.up, self.out = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.while_training:
            return self.out(self.up(x))
        return self.out(nn.functional.linear(x, self.up.weight, self.up.bias))


@pytest.fixture
def no_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def grown(model: nn.Module) -> nn.Module:
    """As after training: the experts add something."""
    with torch.no_grad():
        for site in sites_of(model).values():
            site.expert_out.normal_()
    return model


class TestSkipped:
    @pytest.mark.parametrize("name", ["linear1", "linear2"])
    def test_an_encoder_layer_is_refused_with_the_remedy(self, name):
        message = rf"'block.{name}' belongs to the nn.TransformerEncoderLayer 'block' .*fast path"
        with pytest.raises(ValueError, match=rf"{message}.*mha\.set_fastpath_enabled\(False\)"):
            inject_hilomoe(model := Encoded(), CONFIG, [f"block.{name}"])
        assert not sites_of(model)

    @pytest.mark.usefixtures("no_fast_path")
    def test_an_encoder_layer_computes_its_experts_without_the_fast_path(self):
        model = Encoded()
        inject_hilomoe(model, CONFIG, ["block.linear*"])
        x = torch.randn(3, 5, 8)
        want = grown(model).eval()(x)
        with torch.no_grad():
            assert torch.equal(model(x), want)

    @pytest.mark.usefixtures("no_fast_path")
    def test_a_fast_path_that_comes_back_is_told(self):
        model = Encoded()
        inject_hilomoe(model, CONFIG, ["block.linear*"])
        torch.backends.mha.set_fastpath_enabled(True)
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match=r"in evaluation: block\.linear1, block\.linear2\. "),
        ):
            model.eval()(torch.randn(3, 5, 8))

    def test_attention_s_own_projection_is_named(self):
        message = r"matches none .*: head, only 'attention.out_proj' \(nn.MultiheadAttention reads"
        with pytest.raises(ValueError, match=message):
            inject_hilomoe(Attending(), CONFIG, ["attention*"])
        with pytest.warns(UserWarning, match=r"no experts: 'attention.out_proj' \(nn.Multihead"):
            assert inject_hilomoe(Attending(), CONFIG, ["*"]) == ["head"]

    def test_attention_with_a_plain_projection_is_refused(self):
        model = Attending()
        model.attention.out_proj = nn.Linear(8, 8)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match=r"'attention.out_proj' belongs to the nn.Multihead"):
            inject_hilomoe(model, CONFIG, ["*"])

    def test_a_map_that_no_pass_calls_is_told_once(self):
        model, x = Reading(while_training=True), torch.randn(3, 6)
        inject_hilomoe(model, CONFIG, ["up", "out"])
        with pytest.warns(UserWarning, match=r"first forward in training: up\. .*call them there"):
            model(x)
        model(x)  # warnings are errors

    def test_a_map_that_only_scoring_skips_is_told(self):
        model, x = Reading(while_training=False), torch.randn(3, 6)
        inject_hilomoe(model, CONFIG, ["up", "out"])
        model(x)
        model.eval()(x)  # with gradients, so not yet how models are scored
        with torch.no_grad(), pytest.warns(UserWarning, match="first forward in evaluation: up"):
            model(x)

    def test_copies_and_pickles_are_watched_too(self):
        model = Reading(while_training=True)
        inject_hilomoe(model, CONFIG, ["up"])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            with pytest.warns(UserWarning, match="did not run"):
                other(torch.randn(3, 6))
        assert not model.up.has_run

    def test_nothing_listens_any_more_when_all_is_seen(self):
        model, x = tower(), torch.randn(3, 6)
        inject_hilomoe(model, CONFIG, ["0"])
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks

    def test_a_removed_site_is_not_waited_for(self):
        model = tower()
        inject_hilomoe(model, CONFIG, ["0"])
        sites_of(model)["0"].active_layers = 0
        remove_hilomoe(model)
        model(torch.randn(3, 6))


class TestReparametrized:
    @pytest.mark.parametrize(
        "change",
        [
            lambda m, name: prune.l1_unstructured(m, name, 0.5),
            lambda m, name: parametrizations.weight_norm(m, name),
            lambda m, name: parametrizations.orthogonal(m, name),
        ],
        ids=["prune", "weight_norm", "orthogonal"],
    )
    def test_experts_are_what_the_site_made(self, change):
        model = tower()
        inject_hilomoe(model, CONFIG, ["0"])
        change(model[0], "weight")
        want = {"0.expert_in", "0.expert_out", "0.expert_keys"}
        assert set(expert_parameters(model)) == want
        assert model(torch.randn(3, 6)).isfinite().all()

    def test_reparametrized_experts_are_experts(self):
        model = tower()
        inject_hilomoe(model, CONFIG, ["0"])
        prune.l1_unstructured(model[0], "expert_in", 0.5)
        parametrizations.weight_norm(model[0], "expert_keys")
        assert set(expert_parameters(model)) == {
            "0.expert_in_orig",
            "0.expert_out",
            "0.parametrizations.expert_keys.original0",
            "0.parametrizations.expert_keys.original1",
        }

    def test_reparametrized_keys_route(self):
        model = tower()
        inject_hilomoe(model, CONFIG, ["0"])
        parametrizations.weight_norm(model[0], "expert_keys")
        assert list(sites_of(model)["0"].routing_parameters()) == [
            "parametrizations.expert_keys.original0",
            "parametrizations.expert_keys.original1",
        ]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"router '0' is reparametrized: .*Fix it first, or"):
            fix_random_routing(model, seed=0)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())

    def test_what_a_pattern_passes_over_is_said(self):
        model = tower()
        parametrizations.weight_norm(model[0])
        with pytest.warns(UserWarning, match=r"\['\*'\] also match .*'0' \(a ParametrizedLinear\)"):
            assert inject_hilomoe(model, CONFIG, ["*"]) == ["2"]

    def test_a_pattern_for_nothing_else_is_refused(self):
        model = tower()
        parametrizations.weight_norm(model[0])
        with pytest.raises(ValueError, match=r"'0' matches none .* only '0' \(a ParametrizedLin"):
            inject_hilomoe(model, CONFIG, ["0"])

    def test_a_pruned_map_is_refused_with_the_remedy(self):
        model = tower()
        prune.l1_unstructured(model[0], "weight", 0.5)
        with pytest.raises(ValueError, match=r"'0' has 1 .*\(L1Unstructured\).* after injection"):
            inject_hilomoe(model, CONFIG, ["0"])


class TestOptimizers:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
    def test_one_built_before_injection_is_told_once(self, kind):
        model, x = tower(), torch.randn(9, 6)
        optimizer = kind(model.parameters(), lr=0.1)
        inject_hilomoe(model, CONFIG, ["0"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                model.zero_grad()
                model(x).sum().backward()
                optimizer.step()
        (message,) = [str(warning.message) for warning in caught]
        assert "not their experts: 0.expert_in, 0.expert_out, 0.expert_keys." in message
        assert "optimizer.add_param_group({'params': list(expert_parameters(model)" in message
        optimizer.add_param_group({"params": list(expert_parameters(model).values())})
        model(x).sum().backward()
        optimizer.step()
        assert sites_of(model)["0"].expert_out.any()

    @pytest.mark.parametrize("case", ["frozen base", "keys alone", "grown experts", "fused"])
    def test_what_no_optimizer_has_is_told(self, case):
        model, x = tower(), torch.randn(9, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=case == "fused")
        inject_hilomoe(model, CONFIG, ["0"])
        lacking = ["0.expert_in", "0.expert_out", "0.expert_keys"]
        if case == "frozen base":
            model.requires_grad_(False)
            for parameter in expert_parameters(model).values():
                parameter.requires_grad_(True)
        elif case == "keys alone":
            optimizer.add_param_group({"params": [model[0].expert_in, model[0].expert_out]})
            lacking = ["0.expert_keys"]
        elif case == "grown experts":
            grown(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                model(x).sum().backward()
                optimizer.step()
        (message,) = [str(warning.message) for warning in caught]
        assert f"not their experts: {', '.join(lacking)}. " in message

    def test_a_shared_router_that_no_optimizer_has_is_told(self):
        model, x = Host(), torch.randn(9, 6)
        inject_shared_router(model, CONFIG, ["up"], "first", query_width=1)
        known = [p for name, p in model.named_parameters() if "router" not in name]
        optimizer = torch.optim.SGD(known, lr=0.1)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        with pytest.warns(UserWarning, match=r"not their experts: hilomoe_router\.expert_keys\. "):
            model(x)

    def test_experts_in_an_optimizer_of_their_own_and_other_models_are_not_told(self):
        model, other, x = tower(), tower(), torch.randn(9, 6)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        inject_hilomoe(model, CONFIG, ["0"])
        experts = torch.optim.Adam(expert_parameters(model).values())
        others = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(4):
            others.step()
            model(x).sum().backward()
            base.step()
            experts.step()

    def test_loading_a_checkpoint_is_no_step(self):
        model, x = tower(), torch.randn(9, 6)
        inject_hilomoe(model, CONFIG, ["0"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x)
        model.load_state_dict(tower().state_dict(), strict=False)
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()

    def test_a_model_may_go_in_the_middle_of_another_optimizers_step(self):
        hosts, x = [tower()], torch.randn(9, 6)
        inject_hilomoe(hosts[0], CONFIG, ["0"])
        hosts[0](x)
        other = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

        def drop(*_: object) -> None:
            hosts.clear()
            gc.collect()

        handles = [register_optimizer_step_post_hook(hook) for hook in (drop, lambda *_: None)]
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()

    def test_a_forward_without_numbers_is_watched_in_silence(self):
        """As memory is planned: the parameters that stand in have no address."""
        model, x = tower(), torch.randn(9, 6)
        inject_hilomoe(model, CONFIG, ["0"])
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model(x)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        shapes: dict[str, torch.Tensor] = {
            name: mode.from_tensor(value) for name, value in model.named_parameters()
        }
        with mode:
            functional_call(model, shapes, (x,))

    def test_experts_that_warm_up_from_nothing_are_learning(self):
        model, x = tower(), torch.randn(9, 6)
        inject_hilomoe(model, CONFIG, ["0"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(4):
            model(x).sum().backward()
            optimizer.step()

    def test_frozen_and_inactive_experts_are_not_waited_for(self):
        model, x = tower(), torch.randn(9, 6)
        inject_hilomoe(model, CONFIG, ["0", "2"])
        sites_of(model)["0"].active_layers = 0
        sites_of(model)["2"].requires_grad_(False)
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        for _ in range(4):
            model(x).sum().backward()
            optimizer.step()


class TestWhatHangsOnAMap:
    def test_it_hangs_on_the_site_and_comes_back(self):
        model = tower()
        model[0].register_buffer("seen", torch.ones(2))
        model[0].register_buffer("now", torch.zeros(1), persistent=False)
        model[0].tag = "first"  # pyright: ignore[reportArgumentType]
        model[0].act = nn.ReLU()
        before = model.state_dict()
        inject_hilomoe(model, CONFIG, ["0"])
        site = sites_of(model)["0"]
        assert site.tag == "first"
        assert isinstance(site.act, nn.ReLU)
        assert before.keys() == model.state_dict().keys() - expert_parameters(model).keys()
        site.active_layers = 0
        remove_hilomoe(model)
        assert model[0].tag == "first"
        assert list(model.state_dict()) == list(before)
        assert dict(model[0].named_buffers()).keys() == {"seen", "now"}

    def test_what_the_site_needs_itself_is_refused(self):
        model = tower()
        model[2].config = {"mine": 1}  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"'2' has config, which its site needs .*Rename it"):
            inject_hilomoe(model, CONFIG, ["0", "2"])
        assert not sites_of(model)

    def test_a_forward_of_its_own_is_refused(self):
        model = tower()
        model[0].forward = lambda x: x  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ValueError, match=r"'0' has a forward of its own"):
            inject_hilomoe(model, CONFIG, ["0"])

    def test_hooks_of_the_checkpoint_are_refused(self):
        model = tower()
        model[0].register_state_dict_post_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"'0' has 1 state-dict hook"):
            inject_hilomoe(model, CONFIG, ["0"])


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last = tower(), nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.first(x)))


class TestAFailureLeavesTheModel:
    @pytest.mark.parametrize("name", ["", "a.b", "up", "forward", "training"])
    def test_a_router_s_impossible_name(self, name):
        model = Host()
        before, modules = torch.get_rng_state(), list(model.modules())
        with pytest.raises(ValueError, match=r"name|already"):
            inject_shared_router(model, CONFIG, ["up"], "first", query_width=1, name=name)
        assert list(model.modules()) == modules
        assert torch.equal(torch.get_rng_state(), before)
        assert not model._forward_pre_hooks

    def test_a_later_site_that_cannot_be_built(self):
        model = Host()
        model.last.out_features = 0
        with pytest.raises(ValueError, match=r"out_features must be at least 1"):
            inject_hilomoe(model, CONFIG, ["up", "last"])
        assert not sites_of(model)


def test_a_site_by_hand_has_run_when_it_was_called():
    site = HiLoMoELinear(6, 5, CONFIG)
    assert not site.has_run
    site(torch.randn(3, 6))
    assert site.has_run
