"""A run without its experts: at every step that trains more, the rates of the plain run."""

import json
from dataclasses import replace
from functools import cache

import pytest

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.training.inputs import timeline_of
from torchrec_hilomoe.training.stages import StageTimeline

STEPS = 40
AUTO = ("--model.hilomoe.routing=sample", "--model.hilomoe.route_by=auto")
PLAIN = ("--model.hilomoe=null",)
FROM_PLAIN = "--init_from=runs/plain/checkpoints/step_9"


@cache
def parsed(*options: str) -> RunConfig:
    return parse_run(options).config


def timeline(*options: str, warmup: int = 0, steps: int = STEPS) -> StageTimeline:
    config = parsed(*options)
    train = replace(config.train, warmup_steps=warmup, max_steps=steps)
    return timeline_of(replace(config, train=train), steps_per_epoch=1000)


def rates(found: StageTimeline, steps: range) -> dict[int, tuple[float, float]]:
    """Factors on the rates of tables and backbone, as an optimizer multiplies them."""
    return {
        step: (span.stage.lr_scale, found.decay(step) * span.warmup(step))
        for step in steps
        if (span := found.at(step)).stage.train_backbone
    }


@pytest.mark.parametrize("warmup", [0, 3, 8, 20, 100])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train.frozen_share=0.2"],
        ["--train.frozen_share=0"],
        ["--train.backbone_share=0", "--model.hilomoe.probe_first=true"],
        ["--train.backbone_share=0.01", "--train.frozen_share=0.99"],
        [FROM_PLAIN, "--model.hilomoe.probe_steps=5"],
        [FROM_PLAIN, "--model.hilomoe.probe_first=true"],
    ],
    ids=str,
)
def test_without_experts_each_step_has_the_rate_of_the_plain_run(options, warmup):
    plain = timeline(*PLAIN, *options, warmup=warmup)
    auto = timeline(*AUTO, *options, warmup=warmup)
    auto.leave_out_experts()
    every = range(STEPS)
    assert rates(auto, every) == rates(plain, every)
    for done in (1, 5, 8, 9, 30):
        longer = timeline(*AUTO, *options, warmup=warmup, steps=STEPS * 2)
        longer.leave_out_experts()
        longer.load_state_dict(auto.state_dict(done))
        expected = timeline(*PLAIN, *options, warmup=warmup, steps=STEPS * 2)
        expected.load_state_dict(plain.state_dict(done))
        every = range(done, STEPS * 2)
        assert rates(longer, every) == rates(expected, every)


@pytest.mark.parametrize("warmup", [3, 20, 100])
def test_once_experts_were_taken_out_too(warmup):
    """Their own stages stay as they were: they have been trained."""
    share = "--train.frozen_share=0.2"
    plain, before, after, again = (
        timeline(*options, share, warmup=warmup) for options in (PLAIN, AUTO, AUTO, AUTO)
    )
    (since,) = (step for step in range(STEPS) if before.ends_expert_warmup(step))
    after.leave_out_experts(since)
    begun = max(span.start for span in after.spans)
    assert begun == since
    rest = range(since, STEPS)
    assert rates(after, rest) == rates(plain, rest)
    for step in range(since):
        assert after.at(step).warmup(step) == before.at(step).warmup(step)
    again.leave_out_experts(since)
    again.load_state_dict(after.state_dict(since + 1))
    assert rates(again, rest) == rates(plain, rest)


def test_stages_of_ones_own_are_those_of_the_plain_run():
    """Which has them, too: a warm-up that they cut short is the user's."""
    stages = [
        {"name": "a", "steps": 5, "active_layers": 0, "warmup_steps": 9},
        {"name": "b", "steps": 5, "lr_scale": 2.0, "warmup_steps": 3},
        {"name": "c"},
    ]
    given = f"--train.stages={json.dumps(stages)}"
    plain, auto = timeline(*PLAIN, given), timeline(*AUTO, given)
    auto.leave_out_experts()
    assert auto.spans == plain.spans
    assert rates(auto, range(STEPS)) == rates(plain, range(STEPS))
