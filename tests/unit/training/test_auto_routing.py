"""To which steps of a run a probe listens, and what a run that routes by itself says at its end."""

import re

import pytest

from torchrec_hilomoe.command_line import parse_run, Recorded
from torchrec_hilomoe.training.auto_routing import confirmed, found_and_brought, Window, window_of
from torchrec_hilomoe.training.checkpoint import Brought, RoutingDecision
from torchrec_hilomoe.training.inputs import timeline_of

AUTO = ("--model.hilomoe.routing=sample", "--model.hilomoe.route_by=auto")
AUTO += ("--train.batch_size=100", "--train.backbone_share=0.1")
STEPS_PER_EPOCH = 1000


def window(*options: str) -> Window:
    config = parse_run([*AUTO, *options]).config
    return window_of(config, timeline_of(config, STEPS_PER_EPOCH), STEPS_PER_EPOCH)


def test_it_listens_to_the_last_steps_before_experts_begin():
    found = window("--model.hilomoe.probe_first=false")
    assert found == Window(start=33, stop=100, every=1, held_out=True)
    longer = window("--train.epochs=50", "--train.batch_size=1000")
    assert longer == Window(start=3000, stop=5000, every=10, held_out=False)


@pytest.mark.parametrize(
    ("options", "aside"),
    [
        ([], False),  # 100,000 rows are too few to find anything, aside or not
        (["--train.epochs=2"], True),
        (["--train.epochs=2", "--model.hilomoe.probe_first=false"], False),
        (["--train.epochs=2", "--model.hilomoe.probe_steps=9"], False),
        (["--train.epochs=2", "--init_from=runs/plain/checkpoints/step_9"], False),
        (["--train.epochs=2", "--train.backbone_share=0"], True),
        (["--train.epochs=30"], False),
        (["--train.epochs=30", "--model.hilomoe.probe_first=true"], True),
        (["--model.hilomoe.probe_first=true"], True),
    ],
    ids=str,
)
def test_a_short_run_probes_a_plain_model_aside(options, aside):
    assert window(*options).aside == aside


def test_after_a_plain_model_it_listens_first_but_not_all_the_time():
    given = "--init_from=runs/plain/checkpoints/step_9"
    assert window(given) == Window(start=0, stop=400, every=1, held_out=False)
    assert window(given, "--train.max_steps=50").stop == 25


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--train.max_steps=3"], "cannot judge: 0 rows of the 256 that 8 experts need"),
        (["--train.max_steps=30"], "cannot judge: 200 rows of the 256 that 8 experts need"),
        (["--model.hilomoe.num_experts=256"], "cannot judge: 6,700 rows of the 8,192 that 256"),
        ([], "cannot judge: 6,700 rows would be heard before experts begin, and the whole run has"),
        (
            [
                "--train.max_steps=9",
                "--train.stages=[{name: a, steps: 9, active_layers: 0}, {name: b}]",
            ],
            "cannot judge: the run ends after 9 steps, before experts would begin",
        ),
        (
            ["--train.max_steps=1", "--init_from=runs/plain/checkpoints/step_9"],
            "cannot judge: 100 rows of the 256",
        ),
    ],
    ids=["no step", "few steps", "many experts", "few rows", "no step of experts", "one step"],
)
def test_too_short_a_run_cannot_judge(options, told):
    assert window(*options).shortage.startswith(told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.backbone_share=0"], r"backbone_share is 0\.0 and init_from is None\. Raise"),
        (["--model.hilomoe.probe_steps=101"], r"probe_steps is 101, but .* 100 steps\. Lower it"),
        (
            ["--train.stages=[{name: a, steps: 9, active_layers: 0}, {name: b, active_layers: 0}]"],
            r"route_by is auto, but experts compute in no stage\. Add one",
        ),
    ],
    ids=["no share", "longer than the share", "no experts"],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        window(*options)


FOUND = RoutingDecision(
    step=300,
    route_by=(("hour",), ("category",), ("hour",)),
    gains=(0.002, 0.001, 0.0005),
    verdict="experts should pay",
)


def test_the_end_says_what_was_found_and_what_it_brought():
    recorded = Recorded(command="python apps/train.py --seed 1", test_auc=0.8756)
    found, brought = found_and_brought(FOUND, 0.8806, recorded)
    assert re.search(r"hour, category, .* 0\.0035 nats$", found)
    assert re.search(r"\+0\.0050 .* 0\.8756, .*: python apps/train\.py --seed 1$", brought)
    _, brought = found_and_brought(FOUND, 0.8806, None)
    assert brought.endswith("--model.hilomoe null")


def test_it_says_so_where_the_model_stayed_plain():
    nothing = RoutingDecision(step=3, route_by=None, gains=(), verdict="nothing decides.")
    assert list(found_and_brought(nothing, 0.8, None)) == [
        "found: nothing decides. The model stayed plain."
    ]


def test_what_experts_brought_takes_them_out_only_where_it_is_a_loss():
    def after(low: float, high: float) -> RoutingDecision:
        brought = Brought(step=360, gain=(low + high) / 2, low=low, high=high, rows=5000)
        decided = confirmed(FOUND, brought)
        assert decided.brought == brought
        return decided

    assert after(0.001, 0.002).route_by == after(-0.002, 0.001).route_by == FOUND.route_by
    assert after(-0.002, 0.001).verdict.endswith(
        "Experts brought -0.0005 nats a row by the end of their warm-up (-0.002 to 0.001, "
        "5,000 rows of the validation split)."
    )
    lost = after(-0.002, -0.001)
    assert (lost.route_by, lost.gains) == (None, FOUND.gains)
    assert lost.verdict == (
        "experts were taken out again: routed by hour, category, they brought -0.0015 nats a row "
        "by the end of their warm-up (-0.002 to -0.001, 5,000 rows of the validation split). They "
        "were predicted to gain 0.0035."
    )
    assert list(found_and_brought(lost, 0.8, None)) == [
        f"found: {lost.verdict} The model is plain again."
    ]
    assert confirmed(FOUND, None) == FOUND
