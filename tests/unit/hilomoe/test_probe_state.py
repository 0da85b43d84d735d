"""What a probe has gathered can be saved, and gone on with to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.probed_hosts import (
    build,
    CONFIG,
    EventHost,
    FEATURES,
    make_batch,
    probe_of,
    steps,
)
from tests.helpers.rounding import assert_same
from torchrec_hilomoe import inject_shared_router, InteractionProbe
from torchrec_hilomoe.hilomoe import ProbeReport
from torchrec_hilomoe.hilomoe.probe.interactions import FitSums

FIT, JUDGE, EVERY = 6, 13, 2


def listen(probe: InteractionProbe, model: nn.Module, start: int, stop: int) -> None:
    """Passes ``start`` to ``stop``, of which the first ``FIT`` fit."""
    for step in range(start, stop):
        with probe.fit() if step < FIT else probe.judge():
            steps(model, [step])


def uninterrupted() -> ProbeReport:
    model = build()
    probe = probe_of(model, every=EVERY)
    listen(probe, model, 0, JUDGE)
    return probe.report()


@pytest.mark.parametrize("stop", [0, 1, 3, FIT, FIT + 1, 10, JUDGE])
def test_a_probe_goes_on_from_what_it_has_saved(stop):
    first, second = build(), build()
    probe = probe_of(first, every=EVERY)
    listen(probe, first, 0, stop)
    saved = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    listen(probe, first, stop, JUDGE)  # the copy must not change with it
    again = probe_of(second, every=EVERY)
    again.load_state_dict(saved)
    listen(again, second, stop, JUDGE)
    assert again.report() == uninterrupted()


def test_what_ranks_have_gathered_may_be_added_up():
    """``sums.`` of two halves make what one process has gathered."""
    model, halves = build(), []
    ids = {name: FEATURES[name] for name in "ab"}  # a number's quantiles are those of all ranks
    for seeds in ((0, 2, 4), (1, 3, 5)):
        probe = probe_of(model, features=ids)
        with probe.fit():
            steps(model, seeds)
        halves.append(probe.state_dict())
    whole = probe_of(model, features=ids)
    with whole.fit():
        steps(model, range(FIT))
    want = whole.state_dict()
    draws = 3  # of `random`, the last name: it goes by the number of the pass
    weights = "sums.0.fit.0"
    added = halves[0][weights] + halves[1][weights]
    assert_same(added[:-draws], want[weights][:-draws])
    assert {name for name in want if name.startswith("sums.")} == {
        name for name in halves[1] if name.startswith("sums.")
    }


def test_of_a_site_that_sees_events_one_a_sample_may_be_kept():
    torch.manual_seed(0)
    model, found = EventHost(jagged=False), []
    for thin in (False, True):
        probe = probe_of(
            model,
            sites=["up"],
            features={name: FEATURES[name] for name in "ab"},
            thin_events=thin,
        )
        for phase, seeds in ((probe.fit, range(4)), (probe.judge, range(4, 8))):
            for seed in seeds:
                (ids, number, _), clicks = make_batch(seed, rows=64)
                events = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(seed))
                with phase():
                    nn.functional.binary_cross_entropy_with_logits(
                        model(ids, number, events), clicks
                    ).backward()
        found.append(probe.report())
    assert [report.fit_rows for report in found] == [4 * 64 * 3, 4 * 64]
    assert [report.costs[0].rows_per_sample for report in found] == [3.0, 3.0]


def test_of_events_every_position_is_kept_in_turn(monkeypatch):
    """Histories of one length: the first event of each is not all there is."""
    torch.manual_seed(0)
    model, kept, add = EventHost(jagged=False), [], FitSums.add

    def keep(self, rows):
        kept.append(rows.x_ND)
        add(self, rows)

    monkeypatch.setattr(FitSums, "add", keep)
    features = {name: FEATURES[name] for name in "ab"}
    probe = probe_of(model, sites=["up"], features=features, blocks=2, thin_events=True)
    (ids, number, _), clicks = make_batch(0, rows=64)
    position = torch.arange(3.0)[None, :, None].expand(64, 3, 6)
    with probe.fit():
        for _ in range(6):
            nn.functional.binary_cross_entropy_with_logits(
                model(ids, number, position), clicks
            ).backward()
    assert [len(x_ND) for x_ND in kept] == [64] * 6
    # as often in either of the two blocks that passes would go to
    assert [x_ND.unique().tolist() for x_ND in kept] == [[0], [0], [1], [1], [2], [2]]


def test_a_pass_that_overflowed_is_no_sample_that_judges():
    model = build()
    probe = probe_of(model, paired=True)
    with probe.judge():
        for seed in range(8):
            steps(model, [seed])
            inputs, _ = make_batch(seed)
            (model(*inputs).sum() * float("inf")).backward()
            model.zero_grad()
    assert probe.report().costs[0].rows_per_sample == 1.0


def test_a_pass_whose_loss_overflowed_tells_nothing():
    """A loss scale that was too large: the step is skipped, and what it says of the rows, too."""
    model, overflown = build(), build()
    probes = [probe_of(it) for it in (model, overflown)]
    for probe, it in zip(probes, (model, overflown), strict=True):
        with probe.fit():
            steps(it, [0, 1])
            if it is overflown:
                inputs, _ = make_batch(2)
                (overflown(*inputs).sum() * float("inf")).backward()
    for name, tensor in probes[0].state_dict().items():
        if name != "shared.passes":
            assert_same(probes[1].state_dict()[name], tensor)


def test_a_router_is_not_told_to_choose_by_itself():
    given: Any = "auto"
    with pytest.raises(ValueError, match=r"views is 'auto'.*probe\.views\(\)"):
        inject_shared_router(build(), CONFIG, ["first"], "features", 9, views=given)


@pytest.mark.parametrize(
    "other",
    [
        {"features": {"b": FEATURES["a"], "a": FEATURES["b"], "number": FEATURES["number"]}},
        {"features": dict(reversed(FEATURES.items()))},  # the same, in another order
        {"seed": 5},
        {"blocks": 3},
        {"draws": 2},
        {"sketch": 4},
        {"paired": True},
        {"config": replace(CONFIG, num_layers=1)},  # sets how wide the control `wider` is
    ],
    ids=str,
)
def test_the_state_of_another_probe_is_refused(other):
    model = build()
    probe = probe_of(model)
    listen(probe, model, 0, FIT)
    again = probe_of(model, **other)
    (option,) = other
    named = {"config": "num_layers was 2 and is 1"}.get(option, f"{option} was .* and is ")
    with pytest.raises(ValueError, match=rf"state is of another probe: {named}.*\. Make the probe"):
        again.load_state_dict(probe.state_dict())
    assert not again.state_dict()


@pytest.mark.parametrize("stop", [1, 3, FIT, JUDGE])
def test_a_paired_probe_goes_on_from_what_it_has_saved(stop):
    first, second = build(), build()
    probe = probe_of(first, paired=True)
    listen(probe, first, 0, stop)
    saved = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    listen(probe, first, stop, JUDGE)
    again = probe_of(second, paired=True)
    again.load_state_dict(saved)
    listen(again, second, stop, JUDGE)
    assert again.report() == probe.report()
    assert again.report().fit_rows == FIT * 256
    assert again.report().held_out_rows == (JUDGE - FIT) * 256


def test_a_state_may_come_back_sorted_by_name():
    """With more than ten numbers names and numbers have different orders."""
    columns = {f"column {at}": range(at % 9, at % 9 + 1) for at in range(12)}
    model = build()
    probe = probe_of(model, features=columns)
    listen(probe, model, 0, FIT)
    again = probe_of(model, features=columns)
    again.load_state_dict(dict(sorted(probe.state_dict().items())))
    for name, tensor in probe.state_dict().items():
        assert_same(again.state_dict()[name], tensor)
