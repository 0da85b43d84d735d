"""What a probe advises: never more than what was found can bear, and always what to do next."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.probed_hosts import EventHost, FEATURES, make_batch, probe_of
from torchrec_hilomoe.hilomoe import Gain, LaterLook, LayerChoice, ProbeReport
from torchrec_hilomoe.hilomoe.probe import verdict
from torchrec_hilomoe.hilomoe.probe.advice import advise, CONFIRM, Findings, PlainModel
from torchrec_hilomoe.hilomoe.probe.verdict import look_again

BELIEVE = (
    "believe it after 300 or more steps (apps/probe.py: --steps; its run must have as many: "
    "train.epochs, train.max_steps)."
)
LEARNED = PlainModel(loss=0.4, constant_loss=0.5, steps=300)


def gain(name, value, spread=0.0005):
    return Gain(name=name, site="up", gain=value, low=value - spread, high=value + spread)


def advised(
    *totals, wider: float | None = -0.001, random=0.0005, filled=8, blocks=8, plain=LEARNED
):
    """The advice where layers add up to these totals, and the first adds most."""
    befores = (0.0, *totals)
    layers = [
        LayerChoice(feature=name, gain=total - before, total=total)
        for name, total, before in zip(["hour", "page", "item"], totals, befores, strict=False)
    ]
    best = layers[0].gain if layers else 0.0001
    return advise(
        Findings(
            layers=layers,
            best=gain("hour", best),
            wider=None if wider is None else gain("wider", wider),
            random=gain("random", 0.0, random),
            filled=filled,
            blocks=blocks,
            rows=4096,
            plain=plain,
            least=2e-3,
        )
    )


def test_a_promise_ends_with_how_to_confirm_it():
    advice = advised(0.01, 0.012)
    assert advice.pays
    assert advice.verdict == (
        f"experts should pay: route by hour, page (predicted 0.010, 0.002 nats). {CONFIRM}"
    )


@pytest.mark.parametrize(
    ("plain", "why"),
    [
        (
            PlainModel(loss=0.4),
            "promise 0.410 nats, and the whole loss of the plain model is 0.400",
        ),
        (
            PlainModel(loss=0.7, constant_loss=0.69),
            "the plain model's loss is 0.700, and that of the click rate alone 0.690",
        ),
    ],
)
def test_a_model_that_has_not_learned_promises_nothing(plain, why):
    advice = advised(0.3, 0.41, plain=plain)
    assert not advice.pays
    assert advice.verdict.startswith("cannot tell yet: ")
    assert why in advice.verdict
    assert advice.verdict.endswith(
        "Probe one of more steps (apps/probe.py: --steps, and its run must have as many: "
        "train.epochs, train.max_steps; or --checkpoint of a longer run)."
    )


def test_too_few_rows_are_neither_a_yes_nor_a_no():
    advice = advised(0.01, filled=3)
    assert not advice.pays
    assert "4,096 held-out rows are too few: they fill 3 of 8 blocks" in advice.verdict
    assert "they fill 1 of 2 blocks" in advised(0.01, filled=1, blocks=2).verdict
    assert "probe_steps" in advised(0.01, filled=3, wider=None).verdict
    advice = advised(random=0.002)
    assert advice.verdict.startswith("cannot tell yet: the 4,096 held-out rows are too few: random")
    assert advice.verdict.endswith(
        "Judge by more rows (apps/probe.py: --judge_batches): prepare more for validation "
        "(--valid_percent), or generate more (data.eval_rows)."
    )
    assert advised(0.01, random=0.002).pays


def test_all_doubts_are_told():
    both = advised(0.3, 0.41, filled=1, plain=PlainModel(loss=0.4)).verdict
    assert "whole loss" in both
    assert "too few" in both


@pytest.mark.parametrize("totals", [(), (0.001,), (0.01,)])
@pytest.mark.parametrize("wider", [-0.001, 0.0, 0.0003])
def test_a_wider_head_is_not_promised_where_its_control_gains_nothing(totals, wider):
    """Also where its interval has zero in it."""
    assert "wider head promises more" not in advised(*totals, wider=wider).verdict


def test_a_wider_head_that_gains_more_is_named_whatever_the_verdict():
    more = "A wider head promises more: hidden units for the same FLOPs 0.0200 nats, hour 0.0100."
    assert more in advised(0.01, wider=0.02).verdict
    assert "nats, hour 0.0001." in advised(wider=0.02).verdict
    assert "A wider head promises nothing either." in advised(wider=-0.1).verdict


@pytest.mark.parametrize(("steps", "warned"), [(299, True), (300, False), (None, False)])
def test_a_short_probe_warns(steps, warned):
    plain = PlainModel(loss=0.4, constant_loss=0.5, steps=steps)
    for totals in ((), (0.01,)):
        verdict = advised(*totals, plain=plain).verdict
        assert (f"trained for {steps} steps only" in verdict) == warned
        assert (BELIEVE in verdict) == warned
        assert verdict.endswith(CONFIRM) == bool(totals)


def report_of(total: float, *, pays: bool, verdict: str) -> ProbeReport:
    return ProbeReport(
        features=(),
        controls={},
        layers=(LayerChoice(feature="hour", gain=total, total=total),),
        route_by=(("hour",),),
        pays=pays,
        verdict=verdict,
        costs=(),
        not_judged={},
        fit_rows=1,
        held_out_rows=1,
    )


def test_what_pays_early_is_held_to_what_is_left_later():
    early = report_of(0.02, pays=True, verdict="experts should pay: route by hour.")
    lasting = look_again(early, report_of(0.005, pays=True, verdict="it pays"), 600)
    assert lasting.pays
    assert lasting.later == LaterLook(steps=600, total=0.005)
    assert lasting.verdict == (
        f"{early.verdict} It lasts: probed again after 600 steps, all layers together promise "
        "0.0050 nats, and 0.0200 at first."
    )
    assert lasting.layers == early.layers
    little = look_again(early, report_of(0.0049, pays=True, verdict="it pays"), 600)
    assert not little.pays
    assert (
        "and after 600 steps 0.0049 are left, of which 0.005 are the least that pays"
        in little.verdict
    )
    gone = look_again(early, report_of(0.001, pays=False, verdict="nothing decides."), 600)
    assert not gone.pays
    assert gone.verdict.startswith("nothing decides for long: hour promise 0.0200 nats at first")
    assert gone.verdict.endswith("a plain model learns the rest by itself.")
    unsure = report_of(0.02, pays=False, verdict="cannot tell yet: too few rows.")
    told = look_again(early, unsure, 600)
    assert not told.pays
    assert told.verdict.endswith("After 600 steps: cannot tell yet: too few rows.")
    never = report_of(0.001, pays=False, verdict="nothing decides.")
    assert look_again(never, lasting, 600).pays is False


def test_a_later_look_names_what_it_found_itself():
    """It need not be what was found at first, whose features stay."""
    early = report_of(0.02, pays=True, verdict="experts should pay: route by hour.")
    for total, pays in ((0.02, True), (0.004, False)):
        found = replace(
            report_of(total, pays=True, verdict="it pays"),
            layers=(LayerChoice(feature="user", gain=total, total=total),),
        )
        held = look_again(early, found, 600)
        assert held.pays == pays
        assert f"{total:.4f} " in held.verdict
        assert "by user" in held.verdict
        assert held.route_by == early.route_by


def test_gains_of_events_are_weighed_by_the_sample(monkeypatch):
    """What pays is counted in nats a sample, of which a site may see several rows."""
    found = []
    monkeypatch.setattr(verdict, "advise", lambda it: found.append(it) or advise(it))
    torch.manual_seed(0)
    model = EventHost(jagged=False)
    probe = probe_of(model, sites=["up"], features={name: FEATURES[name] for name in "ab"})
    for phase, seeds in ((probe.fit, range(4)), (probe.judge, range(4, 8))):
        for seed in seeds:
            (ids, number, _), clicks = make_batch(seed, rows=64)
            events = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(seed))
            with phase():
                F.binary_cross_entropy_with_logits(model(ids, number, events), clicks).backward()
    report = probe.report()
    rows = []
    for told, row in (
        (found[0].random, report.controls["random"][0]),
        (found[0].wider, report.controls["wider"][0]),
        (found[0].best, report.features[0]),
    ):
        rows.append(told.gain / row.gain)
        for end in ("low", "high"):  # a product and a quotient: four roundings at the most
            want = rows[-1] * getattr(row, end)
            assert abs(getattr(told, end) - want) <= 4 * sys.float_info.epsilon * abs(want)
    assert max(rows) <= 3.0  # events of which each was drawn alone
    assert min(rows) > 2.0
