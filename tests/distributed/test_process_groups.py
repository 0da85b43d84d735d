"""Models that only some ranks of a job train: they add up over their own ranks, and wait for none.

Four ranks are two groups of two. The groups run different numbers of steps, so that whatever waits
for the other group hangs; what each finds is what one process finds on its rows.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, float64_rounding, rounded
from torchrec_hilomoe import (
    HiLoMoEConfig,
    inject_hilomoe,
    inject_shared_router,
    InteractionProbe,
    routing_report,
    Stage,
    StageDriver,
    StageSchedule,
)
from torchrec_hilomoe.hilomoe import (
    auxiliary_loss,
    CollapseWatch,
    record_routing,
    RoutingReport,
    set_process_group,
    sites_of,
)
from torchrec_hilomoe.hilomoe.losses import AttachedLoss

WIDTH, ROWS, GROUPS = 6, 12, 2
CONFIG = HiLoMoEConfig(num_layers=2, num_experts=4, balance_weight=0.5, z_weight=0.2)


class Host(nn.Module):
    """A map that routes its rows, one that is routed by samples, and an attached loss."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shared, self.small = nn.Linear(WIDTH, 1), AttachedLoss(0.3)

    def forward(self, x):
        query = self.query(x)
        hidden = torch.tanh(self.own(query))
        hidden = self.small(hidden, hidden.square().sum(), torch.tensor(len(hidden)))
        return self.shared(hidden)


def build(group: dist.ProcessGroup | None = None) -> Host:
    torch.manual_seed(1)
    model = Host().double()
    inject_hilomoe(model, CONFIG, ["own"], process_group=group)
    inject_shared_router(model, CONFIG, ["shared"], "query", WIDTH, process_group=group)
    for site in sites_of(model).values():
        nn.init.normal_(site.expert_out)
    set_process_group(model, group)  # of the attached loss, too
    return model


def rows_of(group: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(group)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def here() -> tuple[int, dist.ProcessGroup]:
    """This rank's group: its number, and itself."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    number = dist.get_rank() // 2
    group = groups[number]
    assert isinstance(group, dist.ProcessGroup)
    return number, group


def found_by(host: Host, model: nn.Module, x: torch.Tensor, share: float, steps: int) -> dict:
    """Gradients, loss, warnings and report after some steps."""
    watch = CollapseWatch(host, steps=1, min_entropy=1.0)  # warns of whatever is not balanced
    for _ in range(steps):
        model.zero_grad()
        (model(x).sin().sum() * share).backward()
    with record_routing(host):
        host(x)
    return {
        "grads": {name: p.grad for name, p in host.named_parameters()},
        "loss": auxiliary_loss(host).item(),
        "warned": watch.observe(),
        "report": routing_report(host),
    }


def train_rank(copied: bool) -> dict:
    number, group = here()
    host = build(group)
    if copied:
        host = pickle.loads(pickle.dumps(copy.deepcopy(host)))
    model = DistributedDataParallel(host, process_group=group)
    # Unequal shares: 4 and 8 rows.
    x = rows_of(number)[:4] if dist.get_rank(group) == 0 else rows_of(number)[4:]
    return found_by(host, model, x, 2 / ROWS, steps=1 + number)


def train_alone(number: int) -> dict:
    host = build()
    return found_by(host, host, rows_of(number), 1 / ROWS, steps=1)


def assert_alike(got: RoutingReport, want: RoutingReport) -> None:
    terms = ROWS * WIDTH
    for router, wanted in zip(got.routers, want.routers, strict=True):
        assert (router.rows, router.paths_in_use) == (wanted.rows, wanted.paths_in_use)
        for layer, of_one in zip(router.layers, wanted.layers, strict=True):
            assert layer.load == rounded(of_one.load, terms)
            assert layer.balance_loss == rounded(of_one.balance_loss, terms)


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied and pickled"])
def test_each_group_is_one_process_on_its_rows(copied):
    ranks = run_ranks(train_rank, 2 * GROUPS, copied, timeout=60)
    for number in range(GROUPS):
        alone, members = train_alone(number), ranks[2 * number : 2 * number + 2]
        bound = float64_rounding(build(), rows_of(number), alone["grads"])
        for found in members:
            assert_within(found["grads"], alone["grads"], bound)
            assert found["warned"] == alone["warned"]
            assert_alike(found["report"], alone["report"])
        mean = sum(found["loss"] for found in members) / 2
        assert mean == rounded(alone["loss"], terms=ROWS * WIDTH)


def probe_rank() -> list:
    """Both groups see the same rows, one more often than the other."""
    number, group = here()
    torch.manual_seed(2)
    model = nn.ModuleDict({"query": nn.Identity(), "up": nn.Linear(3, 2)})
    model.forward = lambda x: model["up"](model["query"](x))
    probe = InteractionProbe(
        model,
        HiLoMoEConfig(num_layers=1, num_experts=2),
        ["up"],
        "query",
        {"number": range(0, 1), "pair": range(1, 3)},
        process_group=group,
    )
    rng = torch.Generator().manual_seed(dist.get_rank(group))
    for phase in (probe.fit, probe.judge):
        with phase():
            for _ in range(4):
                model(torch.randn(64, 3, generator=rng)).square().sum().backward()
    if number == 1:  # more often than the other group, which waits for nobody
        with probe.judge():
            model(torch.randn(64, 3, generator=rng)).square().sum().backward()
    return [probe.report().held_out_rows]


def test_a_probe_listens_to_the_ranks_of_its_group():
    four, five = 2 * 4 * 64, 2 * 5 * 64
    assert run_ranks(probe_rank, 2 * GROUPS, timeout=60) == [[four], [four], [five], [five]]


def drive_rank() -> dict[str, torch.Tensor]:
    """Only one group enters a stage and evaluates, with batch norm whose statistics it shares."""
    number, group = here()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    inject_hilomoe(model, CONFIG, ["0"], process_group=group)
    if number == 0:
        return {}
    driver = StageDriver(
        DistributedDataParallel(model, process_group=group),
        StageSchedule(stages=(Stage(name="all"),)),
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        total_steps=1,
    )
    driver.begin_step()
    driver.model(rows_of(dist.get_rank()).float()).square().mean().backward()
    driver.optimizer.step()
    driver.end_step()
    with driver.evaluation():
        return dict(model.state_dict())


def test_a_driver_of_stages_waits_for_the_ranks_of_its_wrapper():
    *_, first, second = run_ranks(drive_rank, 2 * GROUPS, timeout=60)
    assert_within(first, second, 0.0)


def refusals() -> dict[str, str]:
    number, group = here()
    other: Any = dist.new_group([2, 3] if number == 0 else [0, 1])
    found = {}

    def refused(name, call) -> None:
        with pytest.raises(ValueError, match="group") as caught:
            call()
        found[name] = str(caught.value)

    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 1))
    refused("not in it", lambda: inject_hilomoe(model, CONFIG, ["0"], process_group=other))
    wrong: Any = [0, 1]
    refused("no group", lambda: inject_hilomoe(model, CONFIG, ["0"], process_group=wrong))
    assert not sites_of(model)
    inject_hilomoe(model, CONFIG, ["0"], process_group=group)
    refused("another's", lambda: inject_hilomoe(model, CONFIG, ["1"]))
    assert list(sites_of(model)) == ["0"]
    inject_hilomoe(model, CONFIG, ["1"], process_group=group)
    sites_of(model)["1"].group = None
    refused("several", lambda: routing_report(model))
    set_process_group(model, None)
    x = torch.randn(3, WIDTH)
    refused("DDP", lambda: DistributedDataParallel(model, process_group=group)(x))
    set_process_group(model, group)
    pickled = pickle.dumps(model)
    dist.barrier()
    dist.destroy_process_group(group)
    refused("gone", lambda: pickle.loads(pickled)(x))
    return found


def test_what_does_not_fit_is_refused_by_name():
    found = run_ranks(refusals, 2 * GROUPS, timeout=60)[0]
    for name, shown in (
        ("not in it", "rank 0 is not in the process_group"),
        ("no group", "got a list"),
        ("another's", "ranks [0, 1], and these would over all ranks"),
        ("several", "'0': the process group of ranks [0, 1]; '1': all ranks"),
        ("DDP", "add up over ranks [0, 1, 2, 3], but DistributedDataParallel averages"),
        ("gone", "means no group in this process"),
    ):
        assert shown in found[name], name


def compile_rank() -> dict[str, torch.Tensor | None]:
    number, group = here()
    host = build(group)
    model = DistributedDataParallel(host, process_group=group)
    compiled = torch.compile(model, backend="aot_eager")
    x = rows_of(number).chunk(2)[dist.get_rank(group)]
    (compiled(x).sin().sum() * 2 / ROWS).backward()
    return {name: p.grad for name, p in host.named_parameters()}


@pytest.mark.slow
def test_a_compiled_model_adds_up_over_its_group():
    ranks = run_ranks(compile_rank, 2 * GROUPS)
    for number in range(GROUPS):
        alone = train_alone(number)["grads"]
        for grads in ranks[2 * number : 2 * number + 2]:
            assert_within(grads, alone, float64_rounding(build(), rows_of(number), alone))
