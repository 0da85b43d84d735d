"""What a driver of stages refuses, by name."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.helpers.driven_towers import adam, ONE, run, site
from tests.helpers.towers import CONFIG, tower
from torchrec_hilomoe import inject_hilomoe, Stage, StageDriver, StageSchedule
from torchrec_hilomoe.hilomoe import sites_of
from torchrec_hilomoe.training.stages import StageTimeline


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    stage = Stage(name="odd", active_layers=3)
    yield (
        "Stage 'odd': active_layers names layer 3, but site '0' has 2",
        lambda: StageDriver(site(), StageSchedule(stages=(stage,)), adam, total_steps=1),
    )
    yield (
        "trains experts alone, but the model has none. Inject them",
        lambda: StageDriver(
            tower(), StageSchedule.three_stages(num_layers=2), adam, total_steps=50
        ),
    )
    yield (
        "total_steps is None, but the stages of a StageSchedule",
        lambda: StageDriver(site(), ONE, adam),
    )
    yield (
        "total_steps = 3, but the timeline has placed its stages in 9",
        lambda: StageDriver(site(), StageTimeline(ONE, total_steps=9), adam, total_steps=3),
    )
    yield (
        "optimizer is built already (Adam)",
        lambda: StageDriver(
            site(),
            ONE,
            cast(Any, torch.optim.Adam(site().parameters())),
            total_steps=1,
        ),
    )
    yield (
        "optimizer has built Adam of other groups than the 3",
        lambda: StageDriver(
            site(), ONE, lambda _: torch.optim.Adam(tower().parameters()), total_steps=1
        ),
    )
    yield (
        "parameter_groups lacks 0.bias, 2.weight, 2.bias, which require",
        lambda: (
            lambda model: StageDriver(
                model, ONE, adam, total_steps=1, parameter_groups=[{"params": [model[0].weight]}]
            )
        )(site()),
    )
    yield (
        "parameter_groups[1] holds 0.weight again of shape (5, 6)",
        lambda: (
            lambda model: StageDriver(
                model, ONE, adam, total_steps=1, parameter_groups=[{"params": model[0].weight}] * 2
            )
        )(site()),
    )
    yield (
        "parameter_groups[0] holds a tensor of shape (2,)",
        lambda: StageDriver(
            site(), ONE, adam, total_steps=1, parameter_groups=[{"params": [torch.zeros(2)]}]
        ),
    )
    yield (
        "Stage 'own': optimizer = 'sgd', but StageDriver was given",
        lambda: StageDriver(
            site(), StageSchedule(stages=(Stage(name="own", optimizer="sgd"),)), adam, total_steps=1
        ),
    )
    yield (
        "its root of the model is a DataParallel",
        lambda: StageDriver(nn.DataParallel(site()), ONE, adam, total_steps=1),
    )
    yield (
        "model is compiled (a OptimizedModule)",
        lambda: StageDriver(
            cast(Any, torch.compile(site())),
            ONE,
            adam,
            total_steps=1,
        ),
    )
    yield (
        "momentum = 0.9 and dampening = 0.5. A parameter's first step",
        lambda: StageDriver(
            site(),
            ONE,
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.5),
            total_steps=1,
        ),
    )
    yield (
        "needs pipeline=, a function that builds one",
        lambda: StageDriver(site(), ONE, adam, total_steps=1).progress(iter(())),
    )


@pytest.mark.parametrize(("message", "call"), [pytest.param(*r, id=r[0][:40]) for r in refusals()])
def test_what_cannot_work_is_refused_by_name(message, call):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_steps_that_are_not_ended_and_runs_that_are_over_are_refused():
    driver = StageDriver(site(), ONE, adam, total_steps=1)
    driver.begin_step()
    with pytest.raises(ValueError, match="step 0 was begun and not ended. Call end_step"):
        driver.begin_step()
    driver.end_step()
    with pytest.raises(ValueError, match="step = 1 and the run has 1 steps. Ask is_complete"):
        driver.begin_step()


def test_parameters_that_are_replaced_after_the_driver_was_built_are_refused():
    driver = StageDriver(site(), ONE, adam, total_steps=1)
    driver.model.load_state_dict(copy.deepcopy(driver.model.state_dict()), assign=True)
    with pytest.raises(
        ValueError, match=r"0.weight is not the parameter that the driver was built of"
    ):
        driver.begin_step()
    moved = StageDriver(site(), ONE, adam, total_steps=1)
    for parameter in moved.model.parameters():
        parameter.data = parameter.data.clone()  # as model.to() does
    with pytest.raises(ValueError, match=r"0.expert_in.1 is in other memory than when its optim"):
        moved.begin_step()


def test_the_state_of_another_run_is_refused():
    driver = StageDriver(site(), StageSchedule.three_stages(num_layers=2), adam, total_steps=50)
    run(driver, 20)
    state = driver.state_dict()
    with pytest.raises(ValueError, match="of step 20 in stage 'finetune', but this run has 10"):
        StageDriver(site(), ONE, adam, total_steps=10).load_state_dict(state)
    del state["optimizer"]["state"]["dense.2.bias"]
    again = StageDriver(site(), StageSchedule.three_stages(num_layers=2), adam, total_steps=50)
    with pytest.raises(ValueError, match=r"the state lacks \['2.bias'\] and has \[\]"):
        again.load_state_dict(state)


def test_a_state_that_is_not_whole_is_refused_by_what_it_lacks():
    driver = StageDriver(site(), ONE, adam, total_steps=10)
    run(driver, 2)
    for lacks in ("step", "stage", "timeline", "spans", "optimizer"):
        state = {name: part for name, part in driver.state_dict().items() if name != lacks}
        with pytest.raises(ValueError, match=f"lacks {lacks}; it has .* go_on_from"):
            StageDriver(site(), ONE, adam, total_steps=10).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks step, .*; it has nothing. Give what state_dict"):
        driver.load_state_dict({})


def test_experts_that_come_after_the_driver_was_built_are_refused_at_the_next_step():
    driver = StageDriver(site(), ONE, adam, total_steps=4)
    run(driver, 1)
    inject_hilomoe(driver.model, CONFIG, sites=["2"])
    with pytest.raises(ValueError, match="2 got experts after the driver was built.* build the"):
        driver.begin_step()
    again = StageDriver(driver.model, ONE, adam, total_steps=4)
    again.go_on_from(driver.step, {})
    assert sites_of(again.model)["2"].expert_out.count_nonzero() == 0
    run(again, 3)
    assert sites_of(again.model)["2"].expert_out.count_nonzero() > 0
    assert again.is_complete


@pytest.mark.parametrize("step", [1, 20])
@pytest.mark.parametrize(
    ("total_steps", "share", "placed"),
    [(51, 0.2, r"finetune \(steps 13 to 51\)"), (50, 0.4, r"\(steps 0 to 20\)")],
)
def test_the_state_of_other_spans_is_refused(step, total_steps, share, placed):
    """Also where the step is in a stage of the same name."""
    schedules = [
        StageSchedule.three_stages(num_layers=2, backbone_share=it, frozen_share=0.06)
        for it in (0.2, share)
    ]
    driver = StageDriver(site(), schedules[0], adam, total_steps=50)
    run(driver, step)
    other = StageDriver(site(), schedules[1], adam, total_steps=total_steps)
    with pytest.raises(
        ValueError, match=rf"finetune \(steps 13 to 50\), and this run .*{placed}.* Give the"
    ):
        other.load_state_dict(driver.state_dict())


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (lambda groups: torch.optim.SGD(groups, lr=0.01), r"\[\]"),
        (lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9), r"\['momentum_buffer'\]"),
        (lambda groups: torch.optim.Adagrad(groups, lr=0.01), r"\['step', 'sum'\]"),
        (lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True), ".*'max_exp_avg_sq'"),
    ],
)
def test_the_state_of_another_kind_of_optimizer_is_refused(kind, kept):
    driver = StageDriver(site(), ONE, adam, total_steps=5)
    run(driver, 2)
    other = StageDriver(site(), ONE, kind, total_steps=5)
    message = r"is \['exp_avg', 'exp_avg_sq', 'step'\], but the optimizer of this run keeps "
    with pytest.raises(ValueError, match=message + kept):
        other.load_state_dict(driver.state_dict())
