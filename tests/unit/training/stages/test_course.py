"""A schedule while it runs: lengths, plateaus, rates, and a state that comes back to the bit."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe import Stage, StageSchedule
from torchrec_hilomoe.training.stages import Course, Decay, Plateau

PLATEAU = Plateau(metric="auc", patience=2)
UNTIL = StageSchedule(
    stages=(
        Stage(name="warm", steps=50, plateau=PLATEAU),
        Stage(name="frozen", share=0.1, active_layers=1, train_backbone=False),
        Stage(name="rest"),
    )
)


def spans(course: Course) -> list[tuple[str, int, int]]:
    return [(span.stage.name, span.start, span.stop) for span in course.spans]


def run(course: Course, values: list[float], every: int = 10) -> list[bool]:
    """Validate after every ``every`` steps."""
    return [
        course.observe((index + 1) * every, {"auc": value, "logloss": -value})
        for index, value in enumerate(values)
    ]


def test_lengths_in_epochs_are_of_the_training_split():
    schedule = StageSchedule(
        stages=(Stage(name="a", epochs=1), Stage(name="b", epochs=0.5), Stage(name="c"))
    )
    course = Course(schedule, total_steps=100, steps_per_epoch=31)
    assert spans(course) == [("a", 0, 31), ("b", 31, 47), ("c", 47, 100)]
    with pytest.raises(ValueError, match="Stage 'a': epochs = 1, but how many steps an epoch has"):
        schedule.place(100)


def test_a_stage_ends_where_its_metric_stops_improving_and_the_rest_moves_up():
    course = Course(UNTIL, total_steps=100, evaluate_every=10)
    assert spans(course) == [("warm", 0, 50), ("frozen", 50, 60), ("rest", 60, 100)]
    assert run(course, [0.6, 0.7, 0.7, 0.69]) == [False, False, False, True]
    assert spans(course) == [("warm", 0, 40), ("frozen", 40, 50), ("rest", 50, 100)]
    assert course.at(39).stage.name == "warm"
    assert course.at(40).stage.name == "frozen"
    assert course.total_steps == 100


def test_a_stage_that_keeps_improving_ends_at_its_length():
    course = Course(UNTIL, total_steps=100, evaluate_every=10)
    assert not any(run(course, [0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.1, 0.1]))
    assert spans(course)[0] == ("warm", 0, 50)


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
    assert run(Course(schedule, total_steps=100, evaluate_every=10), values) == ends


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
    assert Plateau(metric=metric, min_delta=delta).improves(value, best) is improves


def test_each_stage_judges_by_its_own_validations():
    schedule = StageSchedule(
        stages=(
            Stage(name="a", steps=20, plateau=PLATEAU),
            Stage(name="b", steps=40, plateau=PLATEAU),
            Stage(name="c"),
        )
    )
    course = Course(schedule, total_steps=100, evaluate_every=10)
    # The best of stage a is better than all of stage b, which begins to look for its own.
    assert run(course, [0.9, 0.8, 0.5, 0.6, 0.6, 0.6]) == [False] * 5 + [True]
    assert spans(course) == [("a", 0, 20), ("b", 20, 60), ("c", 60, 100)]


def test_a_plateau_in_the_last_stage_ends_the_run():
    schedule = StageSchedule(stages=(Stage(name="all", plateau=PLATEAU),))
    course = Course(schedule, total_steps=100, evaluate_every=10)
    assert run(course, [0.5, 0.4, 0.4]) == [False, False, True]
    assert course.total_steps == 30


def test_no_batch_is_read_beyond_a_validation_that_may_end_the_stage():
    course = Course(UNTIL, total_steps=100, evaluate_every=8)
    assert [course.sure_until(step) for step in (0, 7, 8, 47, 48, 49)] == [8, 8, 16, 48, 50, 50]
    assert [course.sure_until(step) for step in (50, 60)] == [60, 100]  # these have a fixed end


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    patience=st.integers(1, 3),
)
def test_a_course_that_is_resumed_goes_on_as_if_it_had_not_stopped(values, cut, patience):
    plateau = Plateau(metric="logloss", patience=patience)
    schedule = StageSchedule(
        stages=(
            Stage(name="a", steps=30, plateau=plateau),
            Stage(name="b", share=0.5, plateau=plateau),
            Stage(name="c"),
        )
    )

    def new() -> Course:
        return Course(schedule, total_steps=200, evaluate_every=10)

    whole, first = new(), new()
    for index, value in enumerate(values):
        whole.observe((index + 1) * 10, {"logloss": value})
    for index, value in enumerate(values[:cut]):
        first.observe((index + 1) * 10, {"logloss": value})
    second = new()
    second.restore(json.loads(json.dumps(first.saved())))  # as a checkpoint keeps it
    for index, value in enumerate(values[cut:], start=min(cut, len(values))):
        second.observe((index + 1) * 10, {"logloss": value})
    assert second.saved() == whole.saved()
    assert spans(second) == spans(whole)


def test_a_state_of_another_schedule_is_refused():
    course = Course(UNTIL, total_steps=100, evaluate_every=10)
    saved = {**course.saved(), "ended": {"gone": 3}}
    message = "StageSchedule has no stage 'gone', only 'warm', 'frozen', 'rest'."
    with pytest.raises(ValueError, match=re.escape(message)):
        course.restore(saved)


def test_a_plateau_wants_validations():
    with pytest.raises(ValueError, match="Stage 'warm' ends with a plateau of auc, but train.eval"):
        Course(UNTIL, total_steps=100)


def test_rates_fall_over_the_run_or_over_the_stage():
    schedule = StageSchedule(
        stages=(
            Stage(name="run's", steps=50),
            Stage(name="own", steps=20, decay="linear", decay_floor=0.5),
            Stage(name="steps", decay="step", decay_every=10, decay_factor=0.1),
        )
    )
    course = Course(schedule, total_steps=100, decay=Decay(kind="cosine"))
    assert course.decay(25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [course.decay(step) for step in (50, 60)] == pytest.approx([1.0, 0.75])
    assert [course.decay(step) for step in (70, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.01])


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
        assert [decay.at(step, 100) for step in (0, 25, 50, 100)] == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "step"}, "decay is 'step' and decay_every is null"),
        ({"kind": "step", "every": 0}, "decay_every must be at least 1 step, got 0"),
        ({"factor": 1.5}, "decay_factor = 1.5 must lie above 0 and up to 1"),
        ({"floor": -0.1}, "decay_floor = -0.1 between 0 and 1"),
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
        Plateau(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1.0}, "epochs must be at least 0, got -1.0"),
        ({"epochs": 2, "share": 0.5}, "epochs = 2 and share = 0.5 are both given; keep one"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'; take one of adam, adamw, sgd, adagrad"),
        ({"decay": "step"}, "decay is 'step' and decay_every is null"),
    ],
)
def test_an_impossible_stage_is_refused(options, message):
    with pytest.raises(ValueError, match=f"Stage 'odd': {re.escape(message)}"):
        Stage(name="odd", **options)
