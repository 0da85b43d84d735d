"""TransAct's random time window: what it hides, when, and how often."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn, Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.features import make_features
from tests.helpers.models import batches, in_memory, MODEL
from tests.helpers.rounding import rounding_of, within
from torchrec_hilomoe.backbones.transact import TransAct
from torchrec_hilomoe.config import InjectionConfig, TransActConfig
from torchrec_hilomoe.embeddings.features import (
    FeatureWidths,
    History,
    HistoryWidths,
    SequenceFeatures,
)
from torchrec_hilomoe.models.build import build_task

WIDTHS = FeatureWidths(
    candidate=4,
    context=0,
    histories=(
        HistoryWidths(event=4, max_length=6, timed=True),
        HistoryWidths(event=2, max_length=3, timed=True),
    ),
    embedding=2,
    timed=True,
)
LENGTHS = ((5, 0, 2, 6), (0, 1, 3, 2))
# Seconds from each event to the request; one row's are not in order, and one's all happened after.
AGES = ((9, 2, 2, 1, 0, 5, 1, 2, 0, 7, 1, 3, 0), (1, 2, 0, 2, -3, -4))
REQUESTS = (50, 7, 1_700_000_000, 2_000_000_000)
WINDOW = 3


def build(latest: int = 1, time_window: int | None = WINDOW) -> TransAct:
    model = TransAct(
        WIDTHS, num_layers=2, ffn_width=5, latest=latest, time_window=time_window, head=(7,)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def timed_features() -> SequenceFeatures:
    features = make_features(WIDTHS, LENGTHS)
    time = torch.tensor(REQUESTS)
    histories = []
    for history, ages in zip(features.histories, AGES, strict=True):
        times = torch.repeat_interleave(time, history.lengths) - torch.tensor(ages)
        histories.append(replace(history, times=times))
    return replace(features, histories=tuple(histories), time=time)


def without_recent(features: SequenceFeatures, stretch: int) -> SequenceFeatures:
    """The events that are at least ``stretch`` seconds old, and the latest of each row."""
    histories = []
    for history in features.histories:
        events, lengths, first = [], [], 0
        assert history.times is not None
        times = history.times.tolist()
        for length, now in zip(history.lengths.tolist(), REQUESTS, strict=True):
            row = range(first, first + length)
            kept = [e for e in row if now - times[e] >= stretch or e == row[-1]]
            events += [history.events[e] for e in kept]
            lengths.append(len(kept))
            first += length
        of_rows = torch.tensor(lengths)
        histories.append(replace(history, events=torch.stack(events), lengths=of_rows))
    return replace(features, histories=tuple(histories))


def test_training_is_as_if_a_random_last_stretch_had_not_happened():
    model, features = build(), timed_features()
    model.eval()
    possible = [model(without_recent(features, stretch)) for stretch in range(WINDOW + 1)]
    rounding = rounding_of(model, features)
    model.train()
    met = set()
    for _ in range(40):
        logits = model(features)
        (stretch,) = (s for s, want in enumerate(possible) if within(logits, want, rounding).all())
        met.add(stretch)
    assert met == set(range(WINDOW + 1))


def test_hidden_events_leave_zeros_among_the_latest():
    model, features = build(latest=3), timed_features()
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    events = features.histories[1].events.requires_grad_()
    model(features).sum().backward()
    # The last row's two events of the second history are later than its request: always hidden.
    width = 4
    summary_B4W = seen[0][:, -4 * width :].unflatten(1, (4, width))
    assert (summary_B4W[3].abs().sum(dim=1) > 0).tolist() == [False, False, True, True]
    assert events.grad is not None
    assert not events.grad[-2].any()
    assert events.grad[-1].all()


def test_evaluation_hides_nothing_and_needs_no_times():
    model, plain = build().eval(), build(time_window=None)
    plain.load_state_dict(model.state_dict())
    features = timed_features()
    untimed = tuple(replace(history, times=None) for history in features.histories)
    want = plain(replace(features, histories=untimed, time=None))
    assert torch.equal(model(features), want)
    assert torch.equal(model(replace(features, histories=untimed, time=None)), want)


def test_the_stretch_is_the_seeds():
    model, features = build(), timed_features()
    outputs = []
    for seed in (3, 3, *range(10)):
        torch.manual_seed(seed)
        outputs.append(model(features))
    assert torch.equal(outputs[0], outputs[1])
    assert len({tuple(output.tolist()) for output in outputs}) > 1


class Plain(nn.Module):
    """TransAct behind tensors, as FX traces it."""

    def __init__(self, model: TransAct) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        candidate: Tensor,
        events: Tensor,
        target: Tensor,
        lengths: Tensor,
        times: Tensor,
        time: Tensor,
    ) -> Tensor:
        history = History(events=events, lengths=lengths, target=target, times=times)
        context = candidate[:, :0]
        return self.model(SequenceFeatures(candidate, context, (history,), 6, time))


def test_a_traced_model_draws_anew_each_time():
    widths = replace(WIDTHS, histories=WIDTHS.histories[:1])
    plain = Plain(TransAct(widths, time_window=WINDOW, head=(7,)))
    features = timed_features()
    clicks = features.histories[0]
    inputs = (features.candidate, clicks.events, clicks.target, clicks.lengths, clicks.times)
    traced = torch.fx.symbolic_trace(plain)
    outputs = []
    for seed in range(10):
        torch.manual_seed(seed)
        want = plain(*inputs, features.time)
        torch.manual_seed(seed)
        outputs.append(traced(*inputs, features.time))
        assert torch.equal(outputs[-1], want)
    assert len({tuple(output.tolist()) for output in outputs}) > 1


@pytest.mark.parametrize(
    ("timed", "of_events", "window", "message"),
    [
        (True, (True, True), 0, "TransAct.time_window must be at least 1 second, got 0. Use null"),
        (
            True,
            (False, True),
            60,
            "is 60 seconds, but the schema does not say when things happened",
        ),
        (True, (False, True), 60, "happened: Schema.sequences[0].time is null. Name the columns"),
        (False, (True, True), 60, "happened: Schema.time is null. Name the columns"),
        (False, (True, False), 60, "happened: Schema.time, Schema.sequences[1].time is null."),
    ],
)
def test_an_impossible_window_is_refused(timed, of_events, window, message):
    histories = [replace(h, timed=t) for h, t in zip(WIDTHS.histories, of_events, strict=True)]
    widths = replace(WIDTHS, histories=tuple(histories), timed=timed)
    with pytest.raises(ValueError, match=re.escape(message)):
        TransAct(widths, time_window=window)


def test_times_reach_the_window_from_a_batch():
    """A schema with times, through the lookups, as a recipe asks for it."""
    timed = [replace(group, time=f"{group.name}_time") for group in SCHEMA.sequences]
    schema = replace(SCHEMA, time="time", sequences=tuple(timed))
    window = TransActConfig(ffn_width=8, time_window=2)
    task = in_memory(
        replace(
            MODEL, backbone="transact", transact=window, hilomoe=InjectionConfig(enabled=False)
        ),
        schema,
    )
    batch = next(batches(9, 9))
    lengths = [batch.unpooled[group.fields[0].name].values().shape[0] for group in schema.sequences]
    batch = replace(
        batch, time=torch.full((9,), 5), times=tuple(torch.full((n,), 4) for n in lengths)
    )

    def losses() -> set[float]:
        return {task(batch)[0].item() for _ in range(20)}

    assert len(losses()) == 2  # events of a second ago are hidden by a stretch of two
    task.eval()
    assert len(losses()) == 1


def test_a_schema_without_times_is_refused_before_data_are_read():
    window = TransActConfig(time_window=60)
    message = "happened: Schema.time, Schema.sequences[0].time, Schema.sequences[1].time is null"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_task(replace(MODEL, backbone="transact", transact=window), SCHEMA)
