"""Stages: where they begin and end, what their rates are, what is refused and how it is told."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_hilomoe import Stage, StageSchedule
from torchrec_hilomoe.training.stages import StageSpan


def borders(schedule: StageSchedule, steps: int) -> list[tuple[str, int, int]]:
    return [(span.stage.name, span.start, span.stop) for span in schedule.place(steps)]


def test_the_default_schedule_is_backbone_then_layer_by_layer_then_all():
    schedule = StageSchedule.three_stages(num_layers=3)
    assert borders(schedule, 1000) == [
        ("backbone_warmup", 0, 200),
        ("expert_warmup[1]", 200, 220),
        ("expert_warmup[2]", 220, 240),
        ("expert_warmup[3]", 240, 260),
        ("finetune", 260, 1000),
    ]
    first, *frozen, last = schedule.stages
    assert (first.active_layers, first.experts_learn) == (0, False)
    assert [stage.active_layers for stage in frozen] == [1, 2, 3]
    assert not any(stage.train_backbone or stage.train_tables for stage in frozen)
    assert all(stage.learning_layers is None and stage.experts_learn for stage in frozen)
    assert last.active_layers is None
    assert last.train_backbone
    assert last.train_tables
    assert last.experts_learn


@given(
    steps=st.integers(1, 100_000),
    num_layers=st.integers(1, 8),
    backbone_share=st.floats(0, 0.5),
    frozen_share=st.floats(0, 0.5),
)
def test_stages_cover_a_run_without_gap_and_keep_their_shares(
    steps, num_layers, backbone_share, frozen_share
):
    spans = StageSchedule.three_stages(
        num_layers=num_layers, backbone_share=backbone_share, frozen_share=frozen_share
    ).place(steps)
    assert spans[0].start == 0
    assert spans[-1].stop == steps
    assert all(span.start < span.stop for span in spans)
    assert all(before.stop == after.start for before, after in zip(spans, spans[1:], strict=False))
    frozen = sum(span.stop - span.start for span in spans if not span.stage.train_tables)
    # Two borders are rounded, by half a step each, however many layers share the stretch.
    assert abs(frozen - frozen_share * steps) <= 1 + steps * sys.float_info.epsilon


@given(steps=st.integers(10, 100_000), num_layers=st.integers(1, 8))
def test_by_default_at_most_a_tenth_is_frozen(steps, num_layers):
    spans = StageSchedule.three_stages(num_layers=num_layers).place(steps)
    assert (
        sum(span.stop - span.start for span in spans if not span.stage.train_tables) <= steps / 10
    )


def test_many_small_shares_add_up_to_their_sum():
    schedule = StageSchedule.three_stages(num_layers=3, backbone_share=0.5, frozen_share=0.05)
    assert borders(schedule, 100) == [
        ("backbone_warmup", 0, 50),
        ("expert_warmup[1]", 50, 52),
        ("expert_warmup[2]", 52, 53),
        ("expert_warmup[3]", 53, 55),
        ("finetune", 55, 100),
    ]


def test_without_a_frozen_share_experts_join_while_everything_learns():
    schedule = StageSchedule.three_stages(num_layers=3, backbone_share=0.1, frozen_share=0)
    assert borders(schedule, 50) == [("backbone_warmup", 0, 5), ("finetune", 5, 50)]
    assert schedule.stages[-1].warmup_steps == 0


def test_without_a_backbone_share_a_trained_model_gets_its_experts():
    schedule = StageSchedule.three_stages(num_layers=1, backbone_share=0, frozen_share=0.1)
    assert borders(schedule, 50) == [("expert_warmup[1]", 0, 5), ("finetune", 5, 50)]


def test_without_both_shares_the_only_stage_warms_up():
    schedule = StageSchedule.three_stages(
        num_layers=2, backbone_share=0, frozen_share=0, warmup_steps=7
    )
    assert borders(schedule, 50) == [("finetune", 0, 50)]
    assert schedule.stages[0].warmup_steps == 7


def test_a_plain_model_has_one_stage():
    assert borders(StageSchedule.plain(warmup_steps=3), 8) == [("train", 0, 8)]


def test_stages_of_ones_own():
    schedule = StageSchedule(
        stages=(
            Stage(name="tables", steps=3, train_backbone=False, active_layers=0),
            Stage(name="second layer alone", share=0.25, learning_layers=(2,)),
            Stage(name="never", steps=0),
            Stage(name="rest"),
        )
    )
    assert borders(schedule, 20) == [
        ("tables", 0, 3),
        ("second layer alone", 3, 8),
        ("rest", 8, 20),
    ]


def test_rates_rise_linearly_over_the_warm_up_of_the_stage():
    stage = Stage(name="a", warmup_steps=4)
    span = StageSpan(stage=stage, start=10, stop=20)
    assert [span.warmup(step) for step in range(10, 16)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert StageSpan(stage=Stage(name="a"), start=10, stop=20).warmup(10) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1, "share": 0.5}, "steps = 1 and share = 0.5 are both given; keep one"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"share": 1.5}, "share must be between 0 and 1, got 1.5"),
        ({"share": float("nan")}, "share must be between 0 and 1, got nan"),
        ({"active_layers": -1}, "active_layers must be at least 0, got -1"),
        (
            {"active_layers": 2, "learning_layers": (1, 3)},
            "learning_layers = (1, 3) names layer 3, but layers 1 to 2 compute. "
            "Raise active_layers or drop it",
        ),
        ({"learning_layers": (0,)}, "learning_layers = (0,) names layer 0"),
        (
            {"lr_scale": -0.5},
            "lr_scale = -0.5, expert_lr_scale = 5.0, key_lr_scale = 1.0 and warmup_steps = 0 must",
        ),
        (
            {"expert_lr_scale": -2.0},
            "expert_lr_scale = -2.0, key_lr_scale = 1.0 and warmup_steps = 0 must not",
        ),
        ({"key_lr_scale": float("nan")}, "key_lr_scale = nan and warmup_steps = 0 must not"),
        ({"lr_scale": float("inf")}, "lr_scale = inf"),
        ({"key_lr_scale": -2.0}, "key_lr_scale = -2.0 and warmup_steps = 0 must not"),
        ({"warmup_steps": -3}, "warmup_steps = -3 must not be negative"),
        (
            {"train_backbone": False, "train_tables": False, "active_layers": 0},
            "trains nothing: train_backbone and train_tables are false and no expert layer learns",
        ),
        (
            {"train_backbone": False, "train_tables": False, "learning_layers": ()},
            "Switch one of them on or drop the stage",
        ),
    ],
)
def test_an_impossible_stage_is_refused(options, message):
    with pytest.raises(ValueError, match=f"Stage 'odd'.*{re.escape(message)}"):
        Stage(name="odd", **options)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "StageSchedule.stages is empty; give at least one stage"),
        (
            (Stage(name="a", steps=1), Stage(name="a")),
            "names must differ, got ['a', 'a']",
        ),
        (
            (Stage(name="a"), Stage(name="b")),
            "stage 'a' has none of steps, epochs and share; only the last one, 'b', may take",
        ),
    ],
)
def test_an_impossible_schedule_is_refused(stages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StageSchedule(stages=stages)


@pytest.mark.parametrize(
    ("stages", "covered"),
    [
        ((Stage(name="a", steps=12),), 12),
        ((Stage(name="a", steps=12), Stage(name="b")), 12),
        ((Stage(name="a", steps=3),), 3),
        ((Stage(name="a", share=0.5), Stage(name="b", share=0.4)), 9),
    ],
)
def test_stages_that_need_more_steps_or_leave_some_over_are_refused(stages, covered):
    message = (
        f"the stages cover {covered} steps, but the run has 10. "
        "Let the last stage be open, or change train.max_steps."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        StageSchedule(stages=stages).place(10)
