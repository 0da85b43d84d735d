"""routing_report against counts made by hand from the reference."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from torchrec_hilomoe.hilomoe import (
    HiLoMoEConfig,
    inject_hilomoe,
    record_routing,
    reference,
    routing_report,
    sites_of,
)


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
    (site,) = routing_report(model).sites
    config = sites_of(model)["0"].config
    params = {name: p.detach() for name, p in sites_of(model)["0"].named_parameters()}
    out = reference.hilomoe_linear(torch.cat(batches), params, config)
    losses = reference.losses(out, config)
    assert (site.name, site.rows, site.paths_possible) == ("0", 27, 64)
    for index, layer in enumerate(site.layers):
        load = out.chosen_NLE[:, index].double().mean(dim=0) / top_k
        assert layer.load == pytest.approx(load.tolist())
        assert layer.dead_experts == tuple(e for e in range(4) if load[e] == 0)
        entropy = -sum(p * math.log(p) for p in load.tolist() if p > 0) / math.log(4)
        assert layer.entropy == pytest.approx(entropy)
        assert layer.balance_loss == pytest.approx(losses.balance_L[index].item())
        assert layer.z_loss == pytest.approx(losses.z_L[index].item())
    best_NL = out.scores_NLE.argmax(dim=2)
    assert site.paths_in_use == len({tuple(row) for row in best_NL.tolist()})
    steps = torch.zeros(4, 4)
    for row in best_NL.tolist():
        steps[row[0], row[1]] += 1 / 27
    torch.testing.assert_close(torch.tensor(site.transitions[0]), steps)
    base = nn.functional.linear(torch.cat(batches), params["weight"], params["bias"])
    assert site.output_ratio == pytest.approx(((out.y_NO - base).norm() / base.norm()).item())


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
    handle = "torchrec_hilomoe.hilomoe.report._Totals.add"
    with pytest.MonkeyPatch.context() as patch, record_routing(model):
        patch.setattr(handle, lambda totals, part: seen.append(part))
        model(x)
    assert seen[0].paths_PL.tolist() == [[2]]


def test_is_plain_data():
    model, batches = model_and_batches()
    with record_routing(model):
        model(batches[0])
    assert json.loads(json.dumps(dataclasses.asdict(routing_report(model))))["sites"]


def test_records_only_inside_and_starts_anew():
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"no rows were recorded at any of the model's 1 sites"):
        routing_report(model)
    for batch in batches[:1] * 2:
        with record_routing(model):
            model(batch)
        model(batch)
        assert routing_report(model).sites[0].rows == 7
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
    (layer,) = routing_report(model).sites[0].layers
    assert (layer.load, layer.entropy, layer.score_entropy) == ((1.0,), 1.0, 1.0)
