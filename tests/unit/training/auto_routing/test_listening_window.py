"""To which steps of a run a probe listens, and when too few of them can be heard."""

import pytest

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.training.auto_routing import Window, window_of
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
