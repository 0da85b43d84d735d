"""What a probe hears of a host's loop, and what it makes of it."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.probed_hosts import (
    build,
    CONFIG,
    EventHost,
    FEATURES,
    Features,
    make_batch,
    probe_of,
    probed,
    steps,
)
from tests.helpers.rounding import assert_same, assert_within, float64_rounding
from torchrec_hilomoe import inject_shared_router
from torchrec_hilomoe.hilomoe import draw_probe, LossTerms
from torchrec_hilomoe.hilomoe.probe.interactions import FitSums


def heard(monkeypatch) -> list:
    """The rows of every pass that fits, as they come."""
    found, add = [], FitSums.add

    def keep(self, rows):
        found.append(rows)
        add(self, rows)

    monkeypatch.setattr(FitSums, "add", keep)
    return found


def test_finds_the_feature_that_chooses_the_map():
    report = probed(build()).report()
    assert report.features[0].name == "a"
    assert report.features[0].low > report.controls["random"][0].high
    assert report.route_by[0] == ("a",)
    assert report.layers[1].gain < report.layers[0].gain
    assert report.pays
    assert "route by a" in report.verdict


def test_gradients_are_those_of_each_rows_own_loss(monkeypatch):
    """The loss's division is undone, the weights stay in, an activation in place does no harm."""
    found, model = heard(monkeypatch), build().double()
    inputs, clicks = make_batch(0, rows=5)
    ids, number, free = (part.double() if part.is_floating_point() else part for part in inputs)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25, 3.0], dtype=torch.float64)
    probe = probe_of(model, loss_terms=lambda *_: LossTerms(weights=weights, denominator=40.0))
    with probe.fit():
        losses = F.binary_cross_entropy_with_logits(
            model(ids, number, free), clicks.double(), reduction="none"
        )
        ((losses * weights).sum() / 40.0).backward()
    (rows,) = found
    model.act.inplace = False  # it would change what the reference asks for the gradient of
    for n in range(5):
        outputs: list[torch.Tensor] = []
        handle = model.first.register_forward_hook(lambda m, a, y, kept=outputs: kept.append(y))
        logit = model(ids[n : n + 1], number[n : n + 1], free[n : n + 1])
        loss = F.binary_cross_entropy_with_logits(logit, clicks[n : n + 1].double())
        (want,) = torch.autograd.grad(loss, outputs[0])
        handle.remove()
        bound = float64_rounding(model, ids, free, losses)
        assert_within(rows.delta_NO[n], weights[n] * want[0], bound)
    assert_same(rows.weight_N, weights)


def test_a_host_and_its_sites_may_be_called_by_keywords(monkeypatch):
    class Called(type(build())):
        def forward(self, ids_B2, number_B1, free_BF):
            x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
            return self.last(torch.relu(self.first(input=x))).squeeze(1)

    def terms(*, free_BF: torch.Tensor, **given: torch.Tensor) -> LossTerms:
        return LossTerms(weights=free_BF[:, 0].exp())

    found, model = heard(monkeypatch), Called()
    (ids, number, free), clicks = make_batch(0)
    with probe_of(model, loss_terms=terms).fit():
        logits = model(ids_B2=ids, number_B1=number, free_BF=free)
        F.binary_cross_entropy_with_logits(logits, clicks).backward()
    assert_same(found[0].weight_N, free[:, 0].exp())


def test_a_query_may_be_an_entry_of_what_its_module_returns():
    class Pair(Features):
        def forward(self, ids_B2, number_B1):
            return number_B1, super().forward(ids_B2, number_B1)

    class PairHost(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.first, self.last = Pair(), nn.Linear(15, 8), nn.Linear(8, 1)

        def forward(self, ids_B2, number_B1, free_BF):
            x = torch.cat([self.features(ids_B2, number_B1)[1], free_BF], dim=1)
            return self.last(torch.relu(self.first(x))).squeeze(1)

    torch.manual_seed(0)
    model = PairHost()
    assert probed(model, query_entry=1).report().features[0].name == "a"
    with (
        pytest.raises(ValueError, match=r"query module's output is a tuple.*query_entry"),
        probe_of(model).fit(),
    ):
        steps(model, [0])
    for entry in (5, "query"):
        missing = rf"query_entry is {entry!r}, which the output .* a tuple, has not"
        with pytest.raises(ValueError, match=missing), probe_of(model, query_entry=entry).fit():
            steps(model, [0])


def test_rows_without_weight_are_left_out(monkeypatch):
    found, model = heard(monkeypatch), build()
    weights = torch.ones(256).index_fill(0, torch.tensor([3, 7]), 0.0)
    probe = probe_of(model, loss_terms=lambda *_: LossTerms(weights=weights))
    with probe.fit():
        steps(model, [0])
    assert [len(rows.x_ND) for rows in found] == [254]


def test_rows_without_weight_are_no_samples():
    """They pad a batch, and a layer promises as much with them as without."""
    reports = []
    for padding in (0, 256):
        model = build()
        ones = torch.ones(256 + padding)
        ones[256:] = 0.0
        terms = LossTerms(weights=ones, denominator=256.0)
        probe = probe_of(model, paired=True, loss_terms=lambda *_, terms=terms: terms)
        with probe.judge():
            for seed in range(8):
                inputs, clicks = make_batch(seed)
                inputs = [torch.cat([part, part[:padding]]) for part in inputs]
                losses = F.binary_cross_entropy_with_logits(
                    model(*inputs)[:256], clicks, reduction="sum"
                )
                (losses / 256).backward()
        reports.append(probe.report())
    assert reports[0].costs == reports[1].costs
    assert reports[1].costs[0].rows_per_sample == 1.0


def test_a_constant_factor_on_the_loss_changes_nothing():
    reports = []
    for factor in (1.0, 2.0**-10):  # of micro-batches, or of a loss scale: powers of two are exact
        model = build()
        probe = probe_of(model)
        for phase, seeds in ((probe.fit, range(4)), (probe.judge, range(4, 8))):
            with phase():
                for seed in seeds:
                    inputs, clicks = make_batch(seed)
                    loss = F.binary_cross_entropy_with_logits(model(*inputs), clicks)
                    (loss * factor).backward()
        reports.append(probe.report())
    assert [gain.name for gain in reports[0].features] == [
        gain.name for gain in reports[1].features
    ]
    gains = [torch.tensor([gain.gain for gain in report.features]) for report in reports]
    assert_within(gains[1], gains[0], float(gains[0].abs().max()) * torch.finfo().eps)


def test_two_forwards_before_the_backwards_are_told_apart(monkeypatch):
    found, model = heard(monkeypatch), build()
    probe = probe_of(model)
    batches = [make_batch(seed, rows) for seed, rows in ((0, 64), (1, 32))]
    with probe.fit():
        losses = [
            F.binary_cross_entropy_with_logits(model(*inputs), clicks) for inputs, clicks in batches
        ]
        for loss in losses:
            loss.backward()
    want = [model.first.weight.new_tensor([64, 32]).tolist()]
    assert [[len(rows.x_ND) for rows in found]] == want
    for rows, (inputs, _) in zip(found, batches, strict=True):
        assert_same(rows.x_ND[:, 9:], inputs[2])


def test_hears_nothing_in_evaluation_nor_outside_of_its_phases(monkeypatch):
    found, model = heard(monkeypatch), build()
    probe = probe_of(model)
    steps(model, [0])
    with probe.fit(), torch.no_grad():
        model(*make_batch(1)[0])
    steps(model, [2])
    assert found == []


def test_hears_one_of_so_many_passes(monkeypatch):
    found, model = heard(monkeypatch), build()
    probe = probe_of(model, every=3)
    with probe.fit():
        steps(model, range(7))
    for rows, seed in zip(found, (0, 3, 6), strict=True):
        assert_same(rows.x_ND[:, 9:], make_batch(seed)[0][2])
    with probe.judge():
        steps(model, range(7, 19))
    assert probe.report().held_out_rows == 4 * 256
    held_out = probe._sites[0].held_out
    assert held_out is not None
    assert float(held_out.weight_SKE.sum(dim=(1, 2)).min()) > 0  # they fall into all blocks


def test_changes_neither_outputs_nor_gradients():
    plain, heard_model = build(), build()
    inputs, clicks = make_batch(0)
    probe = probe_of(heard_model)
    F.binary_cross_entropy_with_logits(plain(*inputs), clicks).backward()
    with probe.fit():
        F.binary_cross_entropy_with_logits(heard_model(*inputs), clicks).backward()
    for one, other in zip(plain.parameters(), heard_model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_same(one.grad, other.grad)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"norm": True}], ids=str)
def test_works_under_dropout_and_batch_norm(options):
    report = probed(build(**options)).report()
    assert report.features[0].name == "a"


def test_works_in_bfloat16():
    model = build().bfloat16()
    probe = probe_of(model)
    for phase, seeds in ((probe.fit, range(16)), (probe.judge, range(16, 32))):
        with phase():
            for seed in seeds:
                (ids, *rest), clicks = make_batch(seed)
                logits = model(ids, *(part.bfloat16() for part in rest))
                F.binary_cross_entropy_with_logits(logits.float(), clicks).backward()
    assert probe.report().features[0].name == "a"


def test_sums_are_not_rounded_where_the_backward_pass_is_in_autocast():
    states = []
    for enabled in (False, True):
        model = build()
        probe = probe_of(model, sites=["last"])  # its gradient is the loss's, in float32
        with probe.fit():
            inputs, clicks = make_batch(0)
            loss = F.binary_cross_entropy_with_logits(model(*inputs), clicks)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss.backward()
        states.append(probe.state_dict())
    for name, tensor in states[0].items():
        assert_same(states[1][name], tensor)


def test_several_sites_at_once_are_told_apart():
    report = probed(build(), sites=["first", "last"]).report()
    assert {gain.site for gain in report.features} == {"first", "last"}
    assert [cost.site for cost in report.costs] == ["first", "last"]
    alone = probed(build(), sites=["first"]).report()
    both = [gain for gain in report.features if gain.site == "first"]
    assert both == list(alone.features)


@pytest.mark.parametrize("jagged", [False, True])
def test_rows_of_a_site_that_sees_events_are_events(jagged, monkeypatch):
    found = heard(monkeypatch)
    torch.manual_seed(0)
    model = EventHost(jagged)
    probe = probe_of(
        model, sites=["up"], features={k: FEATURES[k] for k in "ab"}, tokens={"up": "offsets"}
    )

    def run(seeds):
        for seed in seeds:
            (ids, number, _), clicks = make_batch(seed, rows=64)
            events = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(seed))
            logits = model(ids, number, events)
            F.binary_cross_entropy_with_logits(logits, clicks).backward()

    with probe.fit():
        run(range(4))
    with probe.judge():
        run(range(4, 8))
    assert [len(rows.x_ND) for rows in found] == [64 * 3] * 4
    buckets = found[0].buckets.bucket_KN.unflatten(1, (64, 3))
    assert_same(buckets, buckets[:, :, :1].expand_as(buckets))  # a sample's events stay together
    assert [cost.rows_per_sample for cost in probe.report().costs] == [3.0]


def test_pairs_of_layers_do_not_count_the_same_twice():
    """``copy`` is ``a`` again: alone it gains as much, after ``a`` it gains little."""

    class Copied(Features):
        def forward(self, ids_B2, number_B1):
            found = super().forward(ids_B2, number_B1)
            return torch.cat([found, found[:, :4]], dim=1)

    model = build()
    model.features = Copied()
    model.first = nn.Linear(13 + 6, 8)
    features = {"a": range(0, 4), "b": range(4, 8), "copy": range(9, 13)}
    report = probed(model, features=features, draws=4).report()
    alone = {gain.name: gain.gain for gain in report.features}
    assert report.layers[0].feature in ("a", "copy")
    assert report.layers[1].gain < alone[report.layers[0].feature]
    assert report.layers[1].total < alone["a"] + alone["copy"]


def test_sketched_sides_keep_the_ranks_of_features():
    whole = probed(build(), batches=32).report()
    sketched = probed(build(), batches=32, sketch=6).report()
    assert sketched.features[0].name == whole.features[0].name == "a"
    random = sketched.controls["random"][0].high
    assert sketched.features[0].low > random


def test_memory_is_bounded_by_the_sketch():
    torch.manual_seed(0)
    model = build()
    model.first, model.last = nn.Linear(15, 3000), nn.Linear(3000, 1)
    probe = probed(model, sites=["first", "last"], batches=2, sketch=16)
    most = max(t.numel() for site in probe._sites if site.fit for t in site.fit.tensors)
    units = 4 * 3 + 1  # ``a``, ``b`` and two controls with 3 draws each, and a number
    assert most == units * CONFIG.num_experts * 16 * 15  # of `first`: O sketched, D as it is


def test_a_traced_host_is_not_disturbed():
    model = build()
    probe = probe_of(model)
    with probe.fit():
        torch.fx.symbolic_trace(model)
        steps(model, [0])


def test_views_are_what_the_router_wants():
    model = build()
    views = probed(model).views()
    assert views[0] == (range(0, 4),)
    names = inject_shared_router(model, CONFIG, ["first"], "features", 9, views=views)
    assert names == ["first"]


def test_says_when_nothing_decides():
    model = build()
    probe = probe_of(model)

    def run(seeds):
        for seed in seeds:
            inputs, _ = make_batch(seed)
            coins = torch.randint(2, (256,), generator=torch.Generator().manual_seed(seed)).float()
            F.binary_cross_entropy_with_logits(model(*inputs), coins).backward()

    with probe.fit():
        run(range(16))
    with probe.judge():
        run(range(16, 32))
    report = probe.report()
    assert not report.pays
    assert report.verdict.startswith("nothing decides")
    with pytest.raises(ValueError, match="nothing decides.*Keep the plain model"):
        probe.views()


def test_report_is_json_and_a_table_and_a_picture(tmp_path):
    report = probed(build()).report()
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(found["features"][0]) == {"name", "site", "gain", "low", "high"}
    gains = [feature["gain"] for feature in found["features"]]
    assert gains == sorted(gains, reverse=True)
    assert set(found["controls"]) == {"random", "all", "wider"}
    assert found["route_by"][0] == ["a"]
    assert found["pays"] is True
    table = report.table()
    assert table.splitlines()[1].startswith("a ")
    assert table.endswith(report.verdict)
    draw_probe(report, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 0
