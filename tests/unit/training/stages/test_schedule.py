"""A schedule while it runs: lengths, plateaus, rates, and a state that comes back to the bit."""

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.rounding import rounded
from torchrec_hilomoe import Stage, StageSchedule
from torchrec_hilomoe.training.stages import Decay, PlateauConfig, StageTimeline

PLATEAU = PlateauConfig(metric="auc", patience=2)
UNTIL = StageSchedule(
    stages=(
        Stage(name="warm", steps=50, plateau=PLATEAU),
        Stage(name="frozen", share=0.1, active_layers=1, train_backbone=False),
        Stage(name="rest"),
    )
)


def spans(timeline: StageTimeline) -> list[tuple[str, int, int]]:
    return [(span.stage.name, span.start, span.stop) for span in timeline.spans]


def run(timeline: StageTimeline, values: list[float], every: int = 10) -> list[bool]:
    """Validate after every ``every`` steps."""
    return [
        timeline.observe((index + 1) * every, {"auc": value, "logloss": -value})
        for index, value in enumerate(values)
    ]


def test_lengths_in_epochs_are_of_the_training_split():
    schedule = StageSchedule(
        stages=(Stage(name="a", epochs=1), Stage(name="b", epochs=0.5), Stage(name="c"))
    )
    timeline = StageTimeline(schedule, total_steps=100, steps_per_epoch=31)
    assert spans(timeline) == [("a", 0, 31), ("b", 31, 47), ("c", 47, 100)]
    with pytest.raises(ValueError, match="Stage 'a': epochs = 1, but how many steps an epoch has"):
        schedule.place(100)


def test_a_stage_ends_where_its_metric_stops_improving_and_the_rest_moves_up():
    timeline = StageTimeline(UNTIL, total_steps=100, evaluate_every=10)
    assert spans(timeline) == [("warm", 0, 50), ("frozen", 50, 60), ("rest", 60, 100)]
    assert run(timeline, [0.6, 0.7, 0.7, 0.69]) == [False, False, False, True]
    assert spans(timeline) == [("warm", 0, 40), ("frozen", 40, 50), ("rest", 50, 100)]
    assert timeline.at(39).stage.name == "warm"
    assert timeline.at(40).stage.name == "frozen"
    assert timeline.total_steps == 100


def test_a_stage_that_keeps_improving_ends_at_its_length():
    timeline = StageTimeline(UNTIL, total_steps=100, evaluate_every=10)
    assert not any(run(timeline, [0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.1, 0.1]))
    assert spans(timeline)[0] == ("warm", 0, 50)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.5, 0.5, 0.5], [False, False, True]),
        ([math.nan, math.nan], [False, True]),  # no number is no improvement
        ([0.5, 0.6, 0.5, 0.7, 0.6, 0.6], [False, False, False, False, False, True]),
    ],
)
def test_patience_counts_validations_in_a_row(values, ends):
    schedule = StageSchedule(stages=(Stage(name="all", plateau=PLATEAU),))
    assert run(StageTimeline(schedule, total_steps=100, evaluate_every=10), values) == ends


@pytest.mark.parametrize(
    ("metric", "delta", "value", "best", "improves"),
    [
        ("auc", 0.0, 0.6, None, True),
        ("auc", 0.0, 0.6, 0.5, True),
        ("auc", 0.0, 0.5, 0.5, False),
        ("auc", 0.1, 0.6, 0.55, False),
        ("gauc", 0.0, 0.4, 0.5, False),
        ("logloss", 0.0, 0.4, 0.5, True),
        ("logloss", 0.0, 0.6, 0.5, False),
        ("ne", 0.2, 0.4, 0.5, False),
        ("ne", 0.0, math.inf, None, False),
    ],
)
def test_what_an_improvement_is(metric, delta, value, best, improves):
    assert PlateauConfig(metric=metric, min_delta=delta).improves(value, best) is improves


def test_each_stage_judges_by_its_own_validations():
    schedule = StageSchedule(
        stages=(
            Stage(name="a", steps=20, plateau=PLATEAU),
            Stage(name="b", steps=40, plateau=PLATEAU),
            Stage(name="c"),
        )
    )
    timeline = StageTimeline(schedule, total_steps=100, evaluate_every=10)
    # The best of stage a is better than all of stage b, which begins to look for its own.
    assert run(timeline, [0.9, 0.8, 0.5, 0.6, 0.6, 0.6]) == [False] * 5 + [True]
    assert spans(timeline) == [("a", 0, 20), ("b", 20, 60), ("c", 60, 100)]


def test_a_plateau_in_the_last_stage_ends_the_run():
    schedule = StageSchedule(stages=(Stage(name="all", plateau=PLATEAU),))
    timeline = StageTimeline(schedule, total_steps=100, evaluate_every=10)
    assert run(timeline, [0.5, 0.4, 0.4]) == [False, False, True]
    assert timeline.total_steps == 30


def test_no_batch_is_read_beyond_a_validation_that_may_end_the_stage():
    timeline = StageTimeline(UNTIL, total_steps=100, evaluate_every=8)
    assert [timeline.sure_until(step) for step in (0, 7, 8, 47, 48, 49)] == [8, 8, 16, 48, 50, 50]
    assert [timeline.sure_until(step) for step in (50, 60)] == [60, 100]  # these have a fixed end


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    patience=st.integers(1, 3),
)
def test_a_timeline_that_is_resumed_goes_on_as_if_it_had_not_stopped(values, cut, patience):
    plateau = PlateauConfig(metric="logloss", patience=patience)
    schedule = StageSchedule(
        stages=(
            Stage(name="a", steps=30, plateau=plateau),
            Stage(name="b", share=0.5, plateau=plateau),
            Stage(name="c"),
        )
    )

    def new() -> StageTimeline:
        return StageTimeline(schedule, total_steps=200, evaluate_every=10)

    whole, first = new(), new()
    for index, value in enumerate(values):
        whole.observe((index + 1) * 10, {"logloss": value})
    for index, value in enumerate(values[:cut]):
        first.observe((index + 1) * 10, {"logloss": value})
    second = new()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # as a checkpoint keeps it
    for index, value in enumerate(values[cut:], start=min(cut, len(values))):
        second.observe((index + 1) * 10, {"logloss": value})
    assert second.state_dict() == whole.state_dict()
    assert spans(second) == spans(whole)


def test_a_state_of_another_schedule_is_refused():
    timeline = StageTimeline(UNTIL, total_steps=100, evaluate_every=10)
    saved = {**timeline.state_dict(), "ended": {"gone": 3}}
    message = "StageSchedule has no stage 'gone', only 'warm', 'frozen', 'rest'."
    with pytest.raises(ValueError, match=re.escape(message)):
        timeline.load_state_dict(saved)


def test_a_plateau_wants_validations():
    with pytest.raises(ValueError, match="Stage 'warm' ends with a plateau of auc, but train.eval"):
        StageTimeline(UNTIL, total_steps=100)


def test_rates_fall_over_the_run_or_over_the_stage():
    schedule = StageSchedule(
        stages=(
            Stage(name="run's", steps=50),
            Stage(name="own", steps=20, decay=Decay(kind="linear", floor=0.5)),
            Stage(name="steps", decay=Decay(kind="step", every=10, factor=0.1)),
        )
    )
    timeline = StageTimeline(schedule, total_steps=100, decay=Decay(kind="cosine"))
    assert timeline.decay(25) == rounded(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [timeline.decay(step) for step in (50, 60)] == rounded([1.0, 0.75])
    assert [timeline.decay(step) for step in (70, 79, 80, 99)] == rounded([1, 1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]),
    ],
)
def test_shapes_of_decay(kind, factors):
    for floor in (0.0, 0.2):
        decay = Decay(kind=kind, floor=floor)
        want = [floor + (1 - floor) * factor for factor in factors]
        assert [decay.at(step, 100) for step in (0, 25, 50, 100)] == rounded(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "step"}, "decay.kind is 'step' and decay.every is null"),
        ({"kind": "step", "every": 0}, "decay.every must be at least 1 step, got 0"),
        ({"factor": 1.5}, "decay.factor = 1.5 must lie above 0 and up to 1"),
        ({"floor": -0.1}, "decay.floor = -0.1 between 0 and 1"),
    ],
)
def test_an_impossible_decay_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Decay(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "recall"}, "plateau.metric is 'recall'; take one of auc, gauc, logloss, ne"),
        ({"patience": 0}, "plateau.patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "plateau.min_delta must not be negative, got -1.0"),
    ],
)
def test_an_impossible_plateau_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PlateauConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1.0}, "epochs must be at least 0, got -1.0"),
        ({"epochs": 2, "share": 0.5}, "epochs = 2 and share = 0.5 are both given; keep one"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'; take one of adam, adamw, sgd, adagrad"),
    ],
)
def test_an_impossible_stage_is_refused(options, message):
    with pytest.raises(ValueError, match=f"Stage 'odd': {re.escape(message)}"):
        Stage(name="odd", **options)


def test_without_experts_their_own_stages_go_to_the_next_one():
    schedule = StageSchedule.three_stages(num_layers=2, backbone_share=0.3, frozen_share=0.1)
    timeline = StageTimeline(schedule, total_steps=100)
    timeline.leave_out_experts()
    spans = [(span.stage.name, span.start, span.stop) for span in timeline.spans]
    assert spans == [("backbone_warmup", 0, 30), ("finetune", 30, 100)]
    timeline.load_state_dict(timeline.state_dict())
    assert [span.stage.name for span in timeline.spans] == ["backbone_warmup", "finetune"]


def test_without_experts_stages_of_theirs_at_the_end_go_to_the_one_before():
    alone = Stage(name="experts", train_backbone=False, train_tables=False)
    timeline = StageTimeline(
        StageSchedule(stages=(Stage(name="plain", steps=6), alone)), total_steps=10
    )
    timeline.leave_out_experts()
    assert [(span.stage.name, span.start, span.stop) for span in timeline.spans] == [
        ("plain", 0, 10)
    ]


def test_experts_may_be_left_out_once_they_have_warmed_up():
    schedule = StageSchedule.three_stages(num_layers=2, backbone_share=0.3, frozen_share=0.1)
    timeline = StageTimeline(schedule, total_steps=100)
    ends = [step for step in range(101) if timeline.ends_expert_warmup(step)]
    assert ends == [40]
    before = timeline.spans
    timeline.leave_out_experts(40)
    assert timeline.spans == before
    more = Stage(name="experts", steps=40, train_backbone=False, train_tables=False)
    twice = StageSchedule(stages=(*schedule.stages[:-1], Stage(name="all", steps=20), more))
    timeline = StageTimeline(twice, total_steps=100)
    timeline.leave_out_experts(40)
    assert spans(timeline)[-2:] == [("expert_warmup[2]", 35, 40), ("all", 40, 100)]


def test_a_longer_run_without_experts_has_no_step_of_theirs_after_they_were_left_out():
    schedule = StageSchedule.three_stages(num_layers=1, backbone_share=0.5, frozen_share=0.2)
    timeline = StageTimeline(schedule, total_steps=22)
    assert spans(timeline)[1] == ("expert_warmup[1]", 11, 15)
    timeline.leave_out_experts(13)
    assert spans(timeline)[1:] == [("expert_warmup[1]", 11, 13), ("finetune", 13, 22)]


def test_experts_warm_up_only_until_something_learns_beside_them():
    alone = Stage(name="first", steps=2, train_backbone=False, train_tables=False)
    stages = (
        Stage(name="plain", steps=2, active_layers=0),
        alone,
        Stage(name="all", steps=2),
        replace(alone, name="again"),
        Stage(name="rest"),
    )
    timeline = StageTimeline(StageSchedule(stages=stages), total_steps=10)
    assert [step for step in range(10) if timeline.warms_up_experts(step)] == [2, 3]
    assert [step for step in range(11) if timeline.ends_expert_warmup(step)] == [4]


def test_a_run_from_a_plain_model_begins_with_steps_to_listen_to():
    schedule = StageSchedule.three_stages(
        num_layers=1, backbone_share=0.0, frozen_share=0.0, probe_steps=7, warmup_steps=3
    )
    probe, finetune = schedule.place(20)
    assert (probe.stage.name, probe.stop, probe.stage.active_layers) == ("probe", 7, 0)
    assert probe.stage.warmup_steps == 3
    assert finetune.stage.warmup_steps == 0
