"""Stages in a loop of the host's own on ranks: equal to the bit, frozen to the bit, resumed."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain

from tests.helpers.processes import run_ranks
from tests.helpers.staged_hosts import (
    assert_only_what_learns_changes,
    batches,
    BOUNDARIES,
    digests,
    distributed,
    driver_of,
    host,
    Looks,
    owner,
    SCHEDULE,
    STEPS,
)
from torchrec_hilomoe import StageDriver

CPU = torch.device("cpu")
RESUMED = (3, 4, 7)  # in a stage and between two


@dataclass(frozen=True, kw_only=True)
class Case:
    """A host, what distributes it and what drives its steps; None is a loop."""

    kind: type[DLRM] = DLRM
    sharding: str = "table_wise"
    pipeline: Callable[..., Any] | None = TrainPipelineSparseDist
    shared: bool = False


@dataclass(frozen=True)
class Run:
    """What a rank saw: at every boundary and at the end, and at the end of resumed runs."""

    looks: Looks
    resumed: list[dict[str, str]]
    warned: list[str]


def wrapped(task: DLRMTrain, sharding: str) -> nn.Module:
    if sharding == "fsdp":
        fully_shard(task.model.get_submodule("over_arch"))
        fully_shard(task)
        return task
    return DistributedDataParallel(task) if sharding == "ddp" else distributed(task, sharding)


def build(case: Case) -> StageDriver:
    model: nn.Module = wrapped(host(case.kind, case.shared), case.sharding)
    make = case.pipeline
    if make is None:
        return driver_of(model)
    return driver_of(model, pipeline=lambda model, optimizer: make(model, optimizer, CPU))


def state_of(driver: StageDriver) -> dict[str, Any]:
    return {"model": driver.model.state_dict(), "driver": driver.state_dict()}


def train(driver: StageDriver, looped: bool, folder: Path | None = None) -> Looks:
    """Train to the end and look at every boundary; save some steps in a folder."""
    looks: Looks = []
    source = batches(driver.step, dist.get_rank())
    while not driver.is_complete:
        if driver.step in (0, *BOUNDARIES):
            looks.append((SCHEDULE.place(STEPS)[len(looks)].stage.name, digests(driver)))
        if looped:
            driver.begin_step()
            driver.optimizer.zero_grad()
            loss, _ = driver.model(next(source))
            loss.backward()
            driver.optimizer.step()
            driver.end_step()
        else:
            driver.progress(source)
        if folder is not None and driver.step in RESUMED:
            dcp.save(state_of(driver), checkpoint_id=folder / str(driver.step))
    return [*looks, ("", digests(driver))]


def run(case: Case, folder: Path) -> Run:
    looped = case.pipeline is None
    with warnings.catch_warnings(record=True) as caught:
        looks = train(build(case), looped, folder)
    resumed = []
    for step in RESUMED:
        driver = build(case)
        state = state_of(driver)
        dcp.load(state, checkpoint_id=folder / str(step))
        driver.model.load_state_dict(state["model"])
        driver.load_state_dict(state["driver"])
        assert driver.step == step
        train(driver, looped)
        resumed.append(digests(driver))
    return Run(looks, resumed, [str(it.message) for it in caught if "xpert" in str(it.message)])


CASES = {
    "dlrm": Case(),
    "dcn, column-wise, base": Case(
        kind=DLRM_DCN, sharding="column_wise", pipeline=TrainPipelineBase
    ),
    "dcn": Case(kind=DLRM_DCN),
    "replicated tables": Case(sharding="data_parallel"),
    "tables of the host's optimizer": Case(sharding="not fused"),
    "a shared router": Case(shared=True),
    "a loop": Case(pipeline=None),
    "ddp": Case(sharding="ddp", pipeline=None),
    "fsdp": Case(sharding="fsdp", pipeline=None),
    "fsdp, a shared router": Case(sharding="fsdp", pipeline=None, shared=True),
}


def replicated(case: Case, names: Iterable[str]) -> set[str]:
    """Those of which every rank has the same."""
    if case.sharding in ("table_wise", "column_wise", "not fused"):
        return {name for name in names if owner(name) != "tables"}
    if case.sharding == "fsdp":  # a layer's state is with the rank that holds the layer
        return {n for n in names if n.startswith("model.") or not owner(n).startswith("experts")}
    return set(names)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[] if (name, ranks) == ("dlrm", 2) else [pytest.mark.slow])
        for name in CASES
        for ranks in (1, 2)
    ],
)
def test_ranks_are_equal_what_is_frozen_stays_and_a_run_goes_on(name, ranks, tmp_path):
    case = CASES[name]
    runs = run_ranks(run, ranks, case, tmp_path)
    for seen in runs:
        assert not seen.warned
        assert_only_what_learns_changes(seen.looks)
        for (stage, mine), (_, first) in zip(seen.looks, runs[0].looks, strict=True):
            shared = replicated(case, first)
            assert replicated(case, mine) == shared
            for tensor in shared:
                assert mine[tensor] == first[tensor], f"{tensor} entering {stage!r}"
        for step, end in zip(RESUMED, seen.resumed, strict=True):
            assert end == seen.looks[-1][1], f"resumed at step {step}"


@pytest.mark.slow
def test_fsdp_ends_with_the_bits_of_ddp(tmp_path):
    ends = []
    for name in ("fsdp", "ddp"):
        first, _ = run_ranks(run, 2, CASES[name], tmp_path / name)
        end = first.looks[-1][1].items()
        ends.append({n.replace("module.", ""): d for n, d in end if n.startswith("model.")})
    assert ends[0] == ends[1]
