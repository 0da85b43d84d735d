"""What a probe makes of loops and models that are not simple: it is right, or it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers.probed_hosts import (
    build,
    CONFIG,
    EventHost,
    FEATURES,
    Host,
    make_batch,
    probe_of,
    steps,
)
from torchrec_hilomoe.hilomoe import LossTerms, ProbeReport
from torchrec_hilomoe.hilomoe.probe.buckets import FeatureBuckets
from torchrec_hilomoe.hilomoe.probe.gathered import SiteSums
from torchrec_hilomoe.hilomoe.probe.rows import BucketRows


def judged(model: nn.Module, step, **options) -> ProbeReport:
    """The report of a probe that hears ``step(model, seed)`` eight times, and eight more."""
    probe = probe_of(model, **options)
    with probe.fit():
        for seed in range(8):
            step(model, seed)
    with probe.judge():
        for seed in range(8, 16):
            step(model, seed)
    return probe.report()


def one_backward(model: nn.Module, seed: int) -> None:
    steps(model, [seed])


class TwoTasks(Host):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 2)

    def forward(self, ids_B2, number_B1, free_BF):
        x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("weights", [False, True])
def test_tasks_with_a_backward_each_are_heard_as_one_loss(weights):
    """Their gradients add up, here of numbers that add exactly."""

    def run(separate: bool, model: nn.Module, seed: int) -> None:
        inputs, clicks = make_batch(seed)
        clicked, dwelled = model(*inputs).unbind(dim=1)
        losses = (
            F.binary_cross_entropy_with_logits(clicked, clicks),
            0 * F.binary_cross_entropy_with_logits(dwelled, 1 - clicks),
        )
        if separate:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        else:
            (losses[0] + losses[1]).backward()

    terms = LossTerms(weights=torch.rand(256) + 0.5 if weights else None)
    reports = []
    for separate in (False, True):
        torch.manual_seed(0)
        step = partial(run, separate)
        reports.append(judged(TwoTasks(), step, loss_terms=lambda *_: terms))
    assert reports[0] == reports[1]
    assert reports[0].fit_rows == 8 * 256


class CheckpointedHost(Host):
    """The site alone, or the whole model, runs again in the backward."""

    def __init__(self, part: str, *, use_reentrant: bool) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.part, self.use_reentrant = part, use_reentrant

    def forward(self, ids_B2, number_B1, free_BF):
        run = partial(checkpoint, use_reentrant=self.use_reentrant)
        if self.part == "all":
            return run(super().forward, ids_B2, number_B1, free_BF)
        x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
        return self.last(self.act(run(self.first, x))).squeeze(1)


def two_forwards(model: nn.Module, seed: int) -> None:
    """Two forwards, then their backwards: as pipelines and accumulated losses have them."""
    losses = []
    for number in (2 * seed, 2 * seed + 1):
        inputs, clicks = make_batch(number)
        losses.append(F.binary_cross_entropy_with_logits(model(*inputs), clicks))
    for loss in losses:
        loss.backward()


def checkpointed(part: str, *, use_reentrant: bool) -> CheckpointedHost:
    torch.manual_seed(0)
    return CheckpointedHost(part, use_reentrant=use_reentrant)


@pytest.mark.parametrize("step", [one_backward, two_forwards])
@pytest.mark.parametrize("part", ["site", "all"])
def test_a_site_that_a_backward_runs_again_is_heard_once(part, step):
    want = judged(build(), step)
    assert judged(checkpointed(part, use_reentrant=False), step) == want


def test_a_site_that_had_no_graph_at_first_is_heard_when_it_runs_again():
    want = judged(build(), one_backward)
    assert judged(checkpointed("site", use_reentrant=True), one_backward) == want


def test_a_loss_that_overflowed_is_no_forward_without_a_backward():
    def scaled(model: nn.Module, seed: int) -> None:
        inputs, clicks = make_batch(seed)
        loss = F.binary_cross_entropy_with_logits(model(*inputs), clicks)
        (loss * (torch.inf if seed % 8 == 0 else 1.0)).backward()

    model = checkpointed("site", use_reentrant=True)
    assert judged(model, scaled).fit_rows == 7 * 256


def test_who_says_whose_events_are_may_run_after_the_site():
    class Late(EventHost):
        def forward(self, ids_B2, number_B1, events):
            self.features(ids_B2, number_B1)
            up = F.leaky_relu(self.up(events.flatten(0, 1)))
            up = torch.segment_reduce(
                up, "sum", offsets=self.offsets(torch.arange(len(ids_B2) + 1) * 3)
            )
            return self.last(up).squeeze(1)

    def step(model: nn.Module, seed: int) -> None:
        (ids, number, free), clicks = make_batch(seed)
        events = free.unsqueeze(1).repeat(1, 3, 1)
        F.binary_cross_entropy_with_logits(model(ids, number, events), clicks).backward()

    reports = []
    for host in (EventHost, Late):
        torch.manual_seed(0)
        reports.append(judged(host(jagged=True), step, sites=["up"], tokens={"up": "offsets"}))
    assert reports[0] == reports[1]


def test_a_site_that_runs_again_after_another_forward_is_refused():
    model = checkpointed("site", use_reentrant=True)
    with (
        probe_of(model).fit(),
        pytest.raises(ValueError, match=r"another forward has begun.*use_reentrant=False"),
    ):
        two_forwards(model, 0)


def test_a_whole_model_that_runs_again_is_one_pass():
    """So all blocks get rows."""

    def step(model: nn.Module, seed: int) -> None:
        inputs, clicks = make_batch(seed)
        logits = checkpoint(model, *inputs, use_reentrant=False)
        F.binary_cross_entropy_with_logits(logits, clicks).backward()

    model = build()
    model.act = nn.ReLU()
    assert judged(model, step) == judged(build(), one_backward)


def test_what_routes_a_site_is_the_query_before_it():
    class TwoQueries(Host):
        def forward(self, ids_B2, number_B1, free_BF):
            found = super().forward(ids_B2, number_B1, free_BF)
            self.features(ids_B2.flip(0), number_B1)  # of an auxiliary tower
            return found

    torch.manual_seed(0)
    assert judged(TwoQueries(), one_backward) == judged(build(), one_backward)


def test_calls_of_one_site_are_rows_of_their_samples():
    class Twice(Host):
        def forward(self, ids_B2, number_B1, free_BF):
            x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
            both = torch.relu(self.first(x)) + torch.relu(self.first(x.flip(1)))
            return self.last(both).squeeze(1)

    torch.manual_seed(0)
    report = judged(Twice(), one_backward)
    assert report.fit_rows == 2 * 8 * 256
    assert [cost.rows_per_sample for cost in report.costs] == [2.0]


class Copies(Host):
    """The site sees each sample's row so many times, and its outputs are averaged."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, ids_B2, number_B1, free_BF):
        x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1)
        up = self.first(x.unsqueeze(1).expand(-1, self.copies, -1)).mean(dim=1)
        return self.last(torch.relu(up)).squeeze(1)


def test_events_that_say_the_same_promise_what_one_does():
    totals = []
    for copies in (1, 16):
        torch.manual_seed(0)
        totals.append(judged(Copies(copies), one_backward).layers[-1].total)
    assert totals[0] > 0
    assert totals[0] / 2 < totals[1] < 2 * totals[0]  # a sum over independent ones: 16 times


class PaddedHost(Host):
    """The site sees events, of which each sample has one or two; the rest is filled up."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, ids_B2, number_B1, free_BF):
        self.features(ids_B2, number_B1)
        counts_B = 1 + ids_B2[:, 1] % 2
        x = F.pad(free_BF, (0, 9)).unsqueeze(1).repeat(1, self.length, 1)
        there = (torch.arange(self.length) < counts_B[:, None]).unsqueeze(2)
        up = F.leaky_relu(self.first(x * there)) * there
        return self.last(up[:, :2].sum(dim=1) / counts_B[:, None]).squeeze(1)


def test_what_fills_up_histories_promises_nothing():
    reports = []
    for length in (2, 32):
        torch.manual_seed(0)
        reports.append(judged(PaddedHost(length), one_backward))
    assert reports[0].layers == reports[1].layers
    assert reports[0].features == reports[1].features
    assert reports[0].fit_rows == reports[1].fit_rows < 8 * 256 * 2
    # They are computed all the same.
    assert [report.costs[0].rows_per_sample for report in reports] == [2.0, 32.0]


def slopes(shift: float) -> torch.Tensor:
    """What a site's rows say whose inputs are shifted by what 32 bits hold exactly."""
    buckets = FeatureBuckets(FEATURES, CONFIG.num_experts, 2, 0, torch.device("cpu"))
    sums = SiteSums(
        "first",
        nn.Linear(15, 8),
        None,
        config=CONFIG,
        buckets=buckets,
        blocks=4,
        sketch=128,
        seed=0,
        hidden=16,
        thin_events=False,
        paired=False,
        device=torch.device("cpu"),
    )
    for number in range(8):
        rng = torch.Generator().manual_seed(number)
        x_ND = torch.randint(-64, 64, (256, 15), generator=rng) / 64
        query_BQ, delta_NO = (torch.randn(256, width, generator=rng) for width in (9, 8))
        buckets.prepare(query_BQ)
        rows = BucketRows(
            x_ND=x_ND + shift,
            delta_NO=delta_NO,
            weight_N=torch.ones(256),
            buckets=buckets(query_BQ, number),
            samples=256,
        )
        if number == 4:
            sums.settle()
        sums.add(rows, (256, 256), number, judge=number >= 4)
    return sums.evidence().held_out.slopes(torch.ones(1, 4, dtype=torch.float64))[0]


def test_inputs_far_from_zero_do_not_hide_what_there_is():
    shift, deviation = 4096.0, 0.5
    # A mean's square takes as many of 64 bits in each sum.
    lost = 2.0**-52 * (shift / deviation) ** 2 * 8 * 256
    assert float((slopes(0.0) - slopes(shift)).abs().max()) < lost


def test_a_gradient_that_is_not_finite_is_told(caplog):
    model = build()

    def step(model: nn.Module, seed: int) -> None:
        (ids, number, free), clicks = make_batch(seed)
        free[0, 0] = torch.nan
        F.binary_cross_entropy_with_logits(model(ids, number, free), clicks).backward()

    with pytest.raises(ValueError, match=r"'first' had gradients in 8 passes.*none was finite"):
        judged(model, step)
    assert caplog.text.count("is not finite: such passes tell nothing") == 1


def test_an_input_that_was_changed_since_is_refused():
    class Changed(Host):
        def forward(self, ids_B2, number_B1, free_BF):
            x = torch.cat([self.features(ids_B2, number_B1), free_BF], dim=1).detach()
            up = self.first(x)
            x.mul_(0)
            return self.last(torch.relu(up)).squeeze(1)

    torch.manual_seed(0)
    model = Changed()
    model.first.weight.requires_grad_(False)
    with (
        probe_of(model).fit(),
        pytest.raises(ValueError, match=r"input of 'first' was changed in place"),
    ):
        steps(model, [0])


def test_a_buffer_may_be_filled_with_the_next_batch():
    """As with graphs that are captured once."""
    buffer = torch.empty(256, 6)

    def refilled(model: nn.Module, seed: int) -> None:
        (ids, number, free), clicks = make_batch(seed)
        buffer.copy_(free)
        F.binary_cross_entropy_with_logits(model(ids, number, buffer), clicks).backward()

    class Raw(Host):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)

        def forward(self, ids_B2, number_B1, free_BF):
            self.features(ids_B2, number_B1)
            return self.last(torch.relu(self.first(free_BF))).squeeze(1)

    reports = []
    for step in (one_backward, refilled):
        torch.manual_seed(0)
        reports.append(judged(Raw(), step))
    assert reports[0] == reports[1]


def test_rows_either_fit_or_judge():
    probe = probe_of(build())
    with (
        probe.fit(),
        pytest.raises(ValueError, match=r"InteractionProbe.judge: begun inside of probe.fit\(\)"),
        probe.judge(),
    ):
        pass
    with pytest.raises(RuntimeError, match="of the host"), probe.fit():
        raise RuntimeError("of the host")
    assert not probe._listener._handles
    with probe.fit():
        pass


def test_ids_may_be_the_query():
    """Whole numbers are read as numbers are."""

    class Ids(nn.Module):
        def forward(self, ids):
            return ids

    class IdHost(Host):
        def __init__(self) -> None:
            super().__init__()
            self.ids = Ids()

        def forward(self, ids_B2, number_B1, free_BF):
            self.ids(torch.cat([ids_B2, ids_B2], dim=1))
            return super().forward(ids_B2, number_B1, free_BF)

    torch.manual_seed(0)
    features = {"pair": range(0, 2), "other": range(1, 3)}
    report = judged(IdHost(), one_backward, query_module="ids", features=features)
    assert {gain.name for gain in report.features} == set(features)
