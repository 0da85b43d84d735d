"""Stages in a loop of the host's own, in one process."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from tests.helpers.driven_towers import adam, in_three_stages, ONE, rows, run, site, steps
from tests.helpers.staged_hosts import (
    assert_only_what_learns_changes,
    batches,
    BOUNDARIES,
    digests,
    distributed,
    driver_of,
    host,
    Looks,
    SCHEDULE,
    STEPS,
)
from torchrec_hilomoe import Stage, StageDriver, StageSchedule
from torchrec_hilomoe.hilomoe.inject import expert_parameters, set_auxiliary_loss_scale
from torchrec_hilomoe.training.optimizers.stage_optimizers import StageOptimizer
from torchrec_hilomoe.training.stages import Decay, PlateauConfig, StageTimeline

CPU = torch.device("cpu")


def train(driver: StageDriver, until: int | None = None) -> Looks:
    """Train a DLRM with a loop, and look at every boundary and at the end."""
    looks: Looks = []
    source = batches(driver.step)
    while driver.step < (until or STEPS):
        if driver.begin_step():
            looks.append((driver.stage.name, digests(driver)))
        loss, _ = driver.model(next(source))
        loss.backward()
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        driver.end_step()
    return [*looks, ("", digests(driver))]


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


WRAPS: dict[str, Callable[[], nn.Module]] = {
    "bare": host,
    "dmp": lambda: distributed(host(), "table_wise"),
    "ddp": lambda: DistributedDataParallel(host()),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_frozen_keeps_every_bit_and_what_learns_changes(wrap):
    """Parameters, tables and the state of every optimizer, whatever the model is wrapped in."""
    looks = train(driver_of(WRAPS[wrap]()))
    assert [stage for stage, _ in looks] == [*(stage.name for stage in SCHEDULE.stages), ""]
    assert_only_what_learns_changes(looks)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_never_stopped(wrap, step):
    whole = driver_of(WRAPS[wrap]())
    train(whole)
    first = driver_of(WRAPS[wrap]())
    train(first, step)
    second = driver_of(WRAPS[wrap]())
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.step == step
    train(second)
    assert digests(second) == digests(whole)


@pytest.mark.parametrize("step", [0, 2, 3, 6, 10])
def test_a_state_saved_right_after_a_load_is_the_one_that_was_loaded(step):
    """Also at a boundary, where the next stage is not entered yet."""
    states = [in_three_stages(step).state_dict()]
    for _ in range(2):
        driver = in_three_stages()
        driver.load_state_dict(copy.deepcopy(states[-1]))
        assert driver.at_boundary
        states.append(driver.state_dict())
    assert [(it["step"], it["stage"]) for it in states] == [(step, states[0]["stage"])] * 3


@pytest.mark.parametrize("step", [0, 1, 2, 3, 6, 10])
def test_a_run_that_goes_on_is_scored_with_the_expert_layers_of_the_one_that_never_stopped(step):
    first, second = in_three_stages(step), in_three_stages()
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    scores, layers = [], []
    for driver in (first, second):
        with driver.evaluation() as model:
            scores.append(model(rows(99)[0]))
        layers.append(cast(Any, driver.model[0]).active_layers)
    assert layers == [1 if step <= 2 else 2 if step <= 6 else 0] * 2
    assert torch.equal(*scores)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist])
def test_pipelines_of_the_driver_train_as_a_loop_does(pipeline):
    want = driver_of(distributed(host(), "table_wise"))
    train(want)
    got = driver_of(
        distributed(host(), "table_wise"), pipeline=lambda m, o: pipeline(m, o, device=CPU)
    )
    source = batches()
    while not got.is_complete:
        got.progress(source)
        if got.step in (3, *BOUNDARIES):  # in a stage and between two
            with got.evaluation() as model:
                assert not model.training
                model(next(batches(99)))
    assert digests(got) == digests(want)


def test_a_driver_with_one_stage_is_a_plain_loop():
    """To the bit, though each expert layer is a tensor of its own to the optimizer."""
    torch.manual_seed(1)
    plain = site()
    driven = copy.deepcopy(plain)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for step in range(5):
        x, y = rows(step)
        optimizer.zero_grad()
        bce(plain(x), y).backward()
        optimizer.step()
    assert_same(run(StageDriver(driven, ONE, adam, total_steps=5), 5), plain.state_dict())


def test_rates_are_the_hosts_times_the_stages_factors():
    stage = Stage(name="all", lr_scale=0.5, expert_lr_scale=4.0, key_lr_scale=3.0, warmup_steps=2)
    timeline = StageTimeline(
        StageSchedule(stages=(stage,)), total_steps=4, decay=Decay(kind="linear")
    )
    driver = StageDriver(site(), timeline, adam)
    seen = []
    for _ in steps(driver, 4):
        base, experts, keys = driver.optimizer.param_groups
        assert [it["experts"] for it in (base, experts, keys)] == [False, True, True]
        seen.append((base["lr"], experts["lr"], keys["lr"]))
    factors = [0.5, 0.75, 0.5, 0.25]  # of warm-up times decay
    wanted = [(0.01 * (0.5 * f), 0.01 * (4.0 * f), 0.01 * (4.0 * f * 3.0)) for f in factors]
    assert seen == wanted


def test_groups_of_the_host_keep_their_options_and_experts_get_groups_apart():
    model = site()
    base = {n: p for n, p in model.named_parameters() if n not in expert_parameters(model)}
    decay = [p for p in base.values() if p.dim() > 1]
    bias = [p for p in base.values() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1, "lr": 0.1}, {"params": bias}]
    driver = StageDriver(model, ONE, adam, total_steps=1, parameter_groups=groups)
    driver.begin_step()
    shown = [
        (group["experts"], group["lr"], group["weight_decay"], len(group["params"]))
        for group in driver.optimizer.param_groups
    ]
    # Two layers of expert_in and expert_out, and of expert_keys.
    assert shown[:2] == [(False, 0.1, 0.1, 2), (False, 0.01, 0, 2)]
    assert shown[2:] == [(True, 0.01, 0, 4), (True, 0.01, 0, 2)]


def test_what_the_host_has_frozen_learns_in_no_stage():
    model = site()
    dict(model.named_parameters())["2.weight"].requires_grad_(False)
    before = model.state_dict()["2.weight"].clone()
    run(StageDriver(model, StageSchedule.three_stages(num_layers=2), adam, total_steps=50), 50)
    assert torch.equal(model.state_dict()["2.weight"], before)


def test_a_frozen_base_keeps_its_running_statistics_also_after_model_train():
    stages = (Stage(name="layer 1", active_layers=1, train_backbone=False),)
    driver = StageDriver(site(norm=True), StageSchedule(stages=stages), adam, total_steps=4)
    before = dict(copy.deepcopy(driver.model[1].state_dict()))
    run(driver, 2)
    with driver.evaluation() as model:
        model(rows(9)[0])
    run(driver, 2)
    assert_same(driver.model[1].state_dict(), before)


def test_a_plateau_ends_a_stage():
    stages = (
        Stage(name="long", steps=8, active_layers=0, plateau=PlateauConfig(patience=1)),
        Stage(name="all"),
    )
    timeline = StageTimeline(StageSchedule(stages=stages), total_steps=10, evaluate_every=2)
    driver = StageDriver(site(), timeline, adam)
    assert len(list(driver.take(iter(range(10))))) == 2  # what is read surely belongs to the stage
    run(driver, 2)
    assert not driver.observe({"auc": 0.7})
    run(driver, 2)
    assert driver.observe({"auc": 0.6})
    assert driver.at_boundary
    run(driver, 1)
    assert driver.stage.name == "all"
    again = StageDriver(
        site(), StageTimeline(StageSchedule(stages=stages), total_steps=10, evaluate_every=2), adam
    )
    again.load_state_dict(driver.state_dict())
    assert again.span == driver.span


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.NAdam,  # its state is no zero before its first step
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
        lambda groups, lr: torch.optim.Adagrad(groups, lr, initial_accumulator_value=0.1),
    ],
)
def test_any_optimizer_starts_and_goes_on_as_without_a_driver(kind):
    def built() -> StageDriver:
        torch.manual_seed(1)
        return StageDriver(site(), ONE, lambda groups: kind(groups, lr=0.01), total_steps=6)

    plain = built().model
    optimizer = kind(plain.parameters(), lr=0.01)
    for step in range(6):
        x, y = rows(step)
        optimizer.zero_grad()
        bce(plain(x), y).backward()
        optimizer.step()
    first, second = built(), built()
    second.model.load_state_dict(run(first, 3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(run(second, 3), plain.state_dict())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("done", [0, 1, 5, 8])
@pytest.mark.parametrize(
    "kind",
    [torch.optim.NAdam, torch.optim.Adamax, torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adam],
)
def test_dcp_saves_and_loads_the_state_of_any_optimizer(kind, done, tmp_path):
    """DCP loads only what a fresh driver asks for; of layers that never learned there is none."""

    def built() -> StageDriver:
        return in_three_stages(optimizer=lambda groups: kind(groups, lr=0.01))

    def state(driver: StageDriver) -> dict[str, Any]:
        return {"model": driver.model.state_dict(), "driver": driver.state_dict()}

    first = built()
    run(first, done)
    dcp.save(state(first), checkpoint_id=tmp_path)
    second = built()
    asked = state(second)
    dcp.load(asked, checkpoint_id=tmp_path)
    second.model.load_state_dict(asked["model"])
    second.load_state_dict(asked["driver"])
    assert_same(run(second, 10 - done), run(first, 10 - done))
    states = [driver.state_dict()["optimizer"]["state"] for driver in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, one in states[0].items():
        assert_same(states[1][name], one)


@pytest.mark.usefixtures("alone")
def test_wrappers_are_made_anew_with_the_options_that_they_had():
    ddp = DistributedDataParallel(host(), bucket_cap_mb=7, find_unused_parameters=True)
    driver = driver_of(ddp)
    driver.begin_step()
    new = driver.model
    assert isinstance(new, DistributedDataParallel)
    assert new is not ddp
    assert new.module is ddp.module
    assert (new.bucket_bytes_cap, new.find_unused_parameters) == (7 << 20, True)
    with pytest.raises(ValueError, match="is of the time before stage 'plain' and would train"):
        ddp(next(batches()))
    wrapped = []
    own = driver_of(host(), wrap=lambda model: wrapped.append(model) or nn.Sequential(model))
    own.begin_step()
    assert isinstance(own.model, nn.Sequential)
    assert wrapped == [own.model[0]]


@pytest.mark.usefixtures("alone")
def test_a_pipeline_that_still_holds_the_model_is_refused():
    driver = driver_of(distributed(host(), "table_wise"))
    driver.begin_step()
    pipeline = TrainPipelineSparseDist(driver.model, driver.optimizer, CPU)
    ahead = driver.take(batches())
    pipeline.progress(ahead)
    driver.end_step()
    assert not driver.begin_step()
    pipeline.progress(ahead)
    driver.end_step()
    assert driver.at_boundary
    with pytest.raises(
        ValueError, match=r"stage 'layer 1' begins, but a pipeline of stage 'plain'"
    ):
        driver.begin_step()
    pipeline.detach()
    assert driver.begin_step()


def test_micro_batches_and_a_scaled_loss_are_those_of_a_plain_loop():
    """The driver's optimizer under PyTorch's own scaler, to the bit."""
    torch.manual_seed(1)
    plain = site()
    driver = StageDriver(copy.deepcopy(plain), ONE, adam, total_steps=4)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, scaler) -> None:
        optimizer.zero_grad()
        set_auxiliary_loss_scale(model, scaler.get_scale() / 2)
        for micro in (0, 100):
            x, y = rows(step + micro)
            scaler.scale(bce(model(x), y) / 2).backward()
        if isinstance(optimizer, StageOptimizer):
            optimizer.collect_gradients()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in "ab"]
    for step in range(4):
        train(plain, optimizer, step, scalers[0])
        driver.begin_step()
        train(driver.model, driver.optimizer, step, scalers[1])
        driver.end_step()
    assert scalers[0].get_scale() == scalers[1].get_scale() > 8
    assert_same(driver.model.state_dict(), plain.state_dict())
