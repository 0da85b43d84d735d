"""What routers do: reports against counts by hand, warnings of collapse, pictures."""

import dataclasses
import json
import logging
import math
import sys

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, float64_rounding, rounded
from torchrec_hilomoe.backbones.base import HookPoint
from torchrec_hilomoe.hilomoe import (
    CollapseWatch,
    draw_routing,
    HiLoMoEConfig,
    inject_hilomoe,
    inject_shared_router,
    record_routing,
    reference,
    routing_report,
    RoutingReport,
    sites_of,
)
from torchrec_hilomoe.hilomoe.monitor import RoutingLog
from torchrec_hilomoe.hilomoe.report_plots import _draw_paths


def model_and_batches(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    inject_hilomoe(model, HiLoMoEConfig(num_layers=3, num_experts=4, **options), sites=["0"])
    nn.init.normal_(sites_of(model)["0"].expert_out)
    return model.eval(), [torch.randn(rows, 6, dtype=torch.float64) for rows in (7, 0, 20)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_matches_the_reference(top_k):
    model, batches = model_and_batches(top_k=top_k)
    with record_routing(model):
        for batch in batches:
            model(batch)
    report = routing_report(model)
    (router,), (site,) = report.routers, report.sites
    config = sites_of(model)["0"].config
    params = {name: p.detach() for name, p in sites_of(model)["0"].named_parameters()}
    out = reference.hilomoe_linear(torch.cat(batches), params, config)
    losses = reference.losses(out, config)
    assert (router.name, router.rows, router.paths_possible) == ("0", 27, 64)
    terms = out.scores_NLE.numel() + max(tensor.numel() for tensor in params.values())
    for index, layer in enumerate(router.layers):
        load = out.chosen_NLE[:, index].double().mean(dim=0) / top_k
        assert layer.load == rounded(load.tolist(), terms)
        assert layer.dead_experts == tuple(e for e in range(4) if load[e] == 0)
        entropy = -sum(p * math.log(p) for p in load.tolist() if p > 0) / math.log(4)
        assert layer.entropy == rounded(entropy, terms)
        assert layer.balance_loss == rounded(losses.balance_L[index].item(), terms)
        assert layer.z_loss == rounded(losses.z_L[index].item(), terms)
    best_NL = out.scores_NLE.argmax(dim=2)
    assert router.paths_in_use == len({tuple(row) for row in best_NL.tolist()})
    steps = torch.zeros(4, 4, dtype=torch.float64)
    for row in best_NL.tolist():
        steps[row[0], row[1]] += 1 / 27
    found = torch.tensor(router.transitions[0], dtype=torch.float64)
    assert_within(found, steps, float64_rounding(steps))
    base = nn.functional.linear(torch.cat(batches), params["weight"], params["bias"])
    assert site.output_ratio == rounded(((out.y_NO - base).norm() / base.norm()).item(), terms)


def test_of_equal_scores_the_chosen_expert_is_on_the_path():
    """A logit may be the larger by less than what a score can show."""
    model = nn.Sequential(nn.Linear(1, 2))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=3), sites=["0"])
    site, x = sites_of(model)["0"], torch.ones(1, 1)
    with torch.no_grad():
        site.expert_keys[0, :, 0] = torch.tensor([-1.0, 1e-8, 2e-8])
    routing = site.compute(x).routing
    assert routing.chosen_LkN.item() == 2
    assert routing.scores_LEN[0, 1] == routing.scores_LEN[0, 2]
    seen = []
    handle = "torchrec_hilomoe.hilomoe.report._Recorded.add"
    with pytest.MonkeyPatch.context() as patch, record_routing(model):
        patch.setattr(handle, lambda recorded, part: seen.append(part))
        model(x)
    assert seen[0].paths_PL.tolist() == [[2]]


def test_is_plain_data():
    model, batches = model_and_batches()
    with record_routing(model):
        model(batches[0])
    assert json.loads(json.dumps(dataclasses.asdict(routing_report(model))))["routers"]


def test_records_only_inside_and_starts_anew():
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"no rows were recorded at any of the model's 1 sites"):
        routing_report(model)
    for batch in batches[:1] * 2:
        with record_routing(model):
            model(batch)
        model(batch)
        assert routing_report(model).routers[0].rows == 7
    assert not model[0]._forward_hooks


def test_inactive_sites_are_left_out():
    model, batches = model_and_batches()
    sites_of(model)["0"].active_layers = 0
    with record_routing(model):
        model(batches[0])
    with pytest.raises(ValueError, match="active_layers > 0"):
        routing_report(model)


def test_one_expert_is_balanced():
    model = nn.Sequential(nn.Linear(3, 2))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=1, num_experts=1), sites=["0"])
    with record_routing(model):
        model(torch.randn(5, 3))
    (layer,) = routing_report(model).routers[0].layers
    assert (layer.load, layer.entropy, layer.score_entropy) == ((1.0,), 1.0, 1.0)


def model_with(collapsed: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 4))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=4, query_norm=True), sites=["0"])
    if collapsed:
        with torch.no_grad():  # the second layer prefers its third expert, whatever comes
            site = sites_of(model)["0"]
            site.expert_keys[0] = torch.eye(6)[:4] * 30
            site.expert_keys[1] = 0
            site.expert_keys[1, 2] = 100 * torch.eye(6)[:4].sum(dim=0)
    return model


def test_warns_once_of_a_collapsed_layer(caplog):
    model = model_with(collapsed=True)
    watch = CollapseWatch(model, steps=3)
    with caplog.at_level(logging.WARNING, logger="torchrec_hilomoe"):
        for step in range(9):
            model(torch.rand(256, 6))
            assert len(watch.observe()) == (1 if step == 2 else 0)
    (record,) = caplog.records
    message = record.getMessage()
    assert "'0', layer 2, over the last 3 steps: dead experts [0, 1, 3]" in message
    assert "Raise balance_weight" in message


def test_is_silent_about_sound_layers():
    model = model_with(collapsed=False)
    watch = CollapseWatch(model, steps=2)
    for _ in range(4):
        model(torch.randn(512, 6))
        assert watch.observe() == []


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(HookPoint(), nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tower(x)


def test_sites_that_share_a_router_count_once():
    model, config = Shared(), HiLoMoEConfig(num_layers=1, num_experts=4)
    inject_shared_router(model, config, ["tower.[12]"], "tower.0", query_width=6)
    with torch.no_grad():
        model.get_parameter("hilomoe_router.expert_keys").zero_()[0, 2] = 100
    watch, log = CollapseWatch(model, steps=1), RoutingLog(model)
    model(torch.rand(256, 6))
    (message,) = watch.observe()
    assert "'hilomoe_router', layer 1" in message
    log.observe()
    (load,) = log.flush()
    assert (load.router, load.load, load.entropy) == ("hilomoe_router", (0, 0, 1, 0), 0)


def test_says_once_what_it_cannot_watch(caplog):
    model = nn.Sequential(nn.Linear(6, 4))
    inject_hilomoe(model, HiLoMoEConfig(balance_weight=0, z_weight=0), sites=["0"])
    watch, site = CollapseWatch(model, steps=2), sites_of(model)["0"]
    with caplog.at_level(logging.WARNING, logger="torchrec_hilomoe"):
        for layers in (0, 1, 3):
            site.active_layers = layers
            model(torch.rand(8, 6))
            assert watch.observe() == []
            assert len(caplog.records) == min(layers, 1)
    assert "'0' is not watched for collapse" in caplog.text


def test_layers_may_join_later():
    model = model_with(collapsed=True)
    watch, site = CollapseWatch(model, steps=2), sites_of(model)["0"]
    for layers in (0, 1, 2, 2):
        site.active_layers = layers
        model(torch.rand(256, 6))
        messages = watch.observe()
    assert len(messages) == 1


def test_refuses_bad_limits():
    with pytest.raises(ValueError, match=r"steps must be at least 1, got 0\. Use 500"):
        CollapseWatch(nn.Linear(1, 1), steps=0)
    with pytest.raises(ValueError, match=r"min_entropy must lie between 0 and 1, got 2"):
        CollapseWatch(nn.Linear(1, 1), min_entropy=2)


@pytest.fixture
def report() -> RoutingReport:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=3, num_experts=4), sites=["*"])
    with record_routing(model):
        model(torch.randn(64, 6))
    return routing_report(model)


def test_draws_one_picture_a_router(report, tmp_path):
    pytest.importorskip("matplotlib")
    files = draw_routing(report, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["routing-0.png", "routing-2.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_draws_a_line_for_each_transition_in_use(report):
    matplotlib = pytest.importorskip("matplotlib.figure")
    router, axes = report.routers[0], matplotlib.Figure().subplots()
    _draw_paths(axes, router)
    (lines, _, _, _) = axes.collections  # and the experts of three layers
    used = [share for flow in router.transitions for row in flow for share in row if share > 0]
    assert len(lines.get_segments()) == len(lines.get_linewidths()) == len(used)
    assert sorted(lines.get_linewidths()) == rounded([0.3 + 12 * s for s in sorted(used)])


def test_names_the_extra(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'matplotlib>=3.8,<4'"):
        draw_routing(report, tmp_path)
