"""A run that goes on with another length: what has begun stays where it was."""

import pytest

from torchrec_hilomoe.config.stage import PlateauConfig
from torchrec_hilomoe.training.stages import Stage, StageSchedule, StageTimeline

THREE = StageSchedule.three_stages(num_layers=2, backbone_share=0.3, frozen_share=0.2)
FIXED = StageSchedule(stages=(Stage(name="a", share=0.5), Stage(name="b", share=0.5)))


def spans_of(timeline):
    return [(span.stage.name, span.start, span.stop) for span in timeline.spans]


def gone_on_with(schedule, *, steps, then, done):
    """The timeline of a run of ``then`` steps, after ``done`` of one of ``steps``."""
    before = StageTimeline(schedule, total_steps=steps)
    after = StageTimeline(schedule, total_steps=then)
    after.load_state_dict(before.state_dict(done))
    return after


@pytest.mark.parametrize("share", [0.3, 0.55])
@pytest.mark.parametrize("layers", [2, 3, 7])
def test_of_the_same_length_it_is_the_same(share, layers):
    """Also where a border is between two steps."""
    schedule = StageSchedule.three_stages(num_layers=layers, backbone_share=share, frozen_share=0.2)
    for steps in range(1, 60):
        whole = StageTimeline(schedule, total_steps=steps).spans
        for done in range(1, steps + 1):
            assert gone_on_with(schedule, steps=steps, then=steps, done=done).spans == whole


@pytest.mark.parametrize(("backbone", "frozen"), [(0.1, 0.9), (0.1, 0.2), (0.3, 0.7)])
def test_of_the_same_length_it_is_the_same_without_experts(backbone, frozen):
    """Where stages of experts are left out, whatever is left may be one stage alone."""
    schedule = StageSchedule.three_stages(
        num_layers=3, backbone_share=backbone, frozen_share=frozen
    )
    for steps in range(1, 40):
        for done in range(1, steps + 1):
            before, after = (StageTimeline(schedule, total_steps=steps) for _ in range(2))
            for timeline in (before, after):
                timeline.leave_out_experts()
            after.load_state_dict(before.state_dict(done))
            assert after.spans == before.spans


@pytest.mark.parametrize("then", [40, 25])
@pytest.mark.parametrize("done", range(1, 21))
def test_no_stage_comes_back_and_none_jumps_ahead(then, done):
    before = StageTimeline(THREE, total_steps=20)
    after = gone_on_with(THREE, steps=20, then=then, done=done)
    for step in range(done):
        assert after.at(step).stage == before.at(step).stage
        assert after.at(step).start == before.at(step).start
    names = [stage.name for stage in THREE.stages]
    order = [names.index(name) for name, _, _ in spans_of(after)]
    assert order == sorted(order)
    assert after.total_steps == then


def test_what_has_not_begun_is_laid_over_the_new_length():
    after = gone_on_with(THREE, steps=20, then=40, done=4)
    assert spans_of(after) == spans_of(StageTimeline(THREE, total_steps=40))
    after = gone_on_with(THREE, steps=20, then=40, done=8)
    assert spans_of(after) == [
        ("backbone_warmup", 0, 6),
        ("expert_warmup[1]", 6, 10),
        ("expert_warmup[2]", 10, 14),
        ("finetune", 14, 40),
    ]


def test_a_shorter_run_begins_the_stages_that_are_left():
    after = gone_on_with(THREE, steps=90, then=25, done=20)
    assert spans_of(after) == [
        ("backbone_warmup", 0, 20),
        ("expert_warmup[1]", 20, 23),
        ("expert_warmup[2]", 23, 25),
    ]


def test_the_last_stage_lasts_to_the_end_though_it_has_a_share():
    after = gone_on_with(FIXED, steps=20, then=40, done=15)
    assert spans_of(after) == [("a", 0, 10), ("b", 10, 40)]


@pytest.mark.parametrize("done", range(10, 40))
def test_gone_on_with_twice_is_gone_on_with_once(done):
    once = gone_on_with(THREE, steps=20, then=40, done=9)
    twice = StageTimeline(THREE, total_steps=40)
    twice.load_state_dict(once.state_dict(done))
    assert twice.spans == once.spans


@pytest.mark.parametrize(("since", "done"), [(0, 4), (0, 7), (0, 12), (8, 9), (8, 12)])
def test_stages_of_experts_that_were_left_out_stay_out(since, done):
    before, after = (StageTimeline(THREE, total_steps=steps) for steps in (20, 40))
    for timeline in (before, after):
        timeline.leave_out_experts(since)
    after.load_state_dict(before.state_dict(done))
    assert [after.at(step).stage for step in range(done)] == [
        before.at(step).stage for step in range(done)
    ]
    assert after.total_steps == 40


def test_a_plateau_after_it_ends_its_stage_there():
    plateau = PlateauConfig(metric="auc", patience=1)
    schedule = StageSchedule(
        stages=(
            Stage(name="a", share=0.25),
            Stage(name="b", share=0.25, plateau=plateau),
            Stage(name="c"),
        )
    )
    before, after = (
        StageTimeline(schedule, total_steps=steps, evaluate_every=1) for steps in (20, 40)
    )
    after.load_state_dict(before.state_dict(6))
    assert spans_of(after) == [("a", 0, 5), ("b", 5, 15), ("c", 15, 40)]
    after.observe(7, {"auc": 0.5})
    assert after.observe(8, {"auc": 0.5})
    assert spans_of(after) == [("a", 0, 5), ("b", 5, 8), ("c", 8, 40)]


def test_other_stages_begin_where_they_lie():
    """Of a run whose stages were changed it is not known which one goes on."""
    before = StageTimeline(FIXED, total_steps=20)
    after = StageTimeline(THREE, total_steps=40)
    after.load_state_dict(before.state_dict(15))
    assert spans_of(after) == spans_of(StageTimeline(THREE, total_steps=40))
