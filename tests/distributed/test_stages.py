"""A run through its stages on two ranks: equal to the bit, and frozen to the bit."""

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.datasets import toy_source
from tests.helpers.models import MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import rounded
from tests.helpers.sharded import assembled, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.hilomoe.inject import auxiliary_loss
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.checkpoint import Saver
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.optimizers.container import OptimizersContainer
from torchrec_hilomoe.training.stages import Decay, Stage, StageSchedule, StageTimeline
from torchrec_hilomoe.training.trainer import Intervals, Trainer, training_state

STEPS, BATCH, ROWS = 12, 16, 100  # seven batches an epoch, the last of 4 rows
CONFIG = RunConfig(
    model=replace(
        MODEL,
        batch_norm=True,
        dropout=0.1,
        hilomoe=InjectionConfig(num_layers=2, num_experts=4, query_dim=3, sites=("head", "ffn")),
    ),
    train=TrainConfig(batch_size=BATCH, learning_rate=0.01),
)
THREE_STAGES = StageSchedule.three_stages(
    num_layers=2, backbone_share=0.25, frozen_share=0.5, warmup_steps=2
)
# As design's option: a layer alone, while those before it compute but keep what they know.
EACH_ALONE = StageSchedule(
    stages=(
        Stage(name="tables alone", steps=2, active_layers=0, train_backbone=False),
        Stage(name="1", steps=3, active_layers=1, train_backbone=False, train_tables=False),
        Stage(
            name="2 alone",
            steps=3,
            active_layers=2,
            learning_layers=(2,),
            train_backbone=False,
            train_tables=False,
        ),
        Stage(name="all but experts", learning_layers=()),
    )
)


LEARN = {
    "backbone_warmup": {"tables", "backbone"},
    "expert_warmup[1]": {"experts 1", "routing"},
    "expert_warmup[2]": {"experts 1", "experts 2", "routing"},
    "finetune": {"tables", "backbone", "experts 1", "experts 2", "routing"},
    "tables alone": {"tables"},
    "1": {"experts 1", "routing"},
    "2 alone": {"experts 2", "routing"},
    "all but experts": {"tables", "backbone"},
}


@dataclass(frozen=True)
class Look:
    """A rank's view at a boundary.

    Attributes:
        stage: The stage that begins; empty at the end.
        digests: Of what this rank holds of every tensor that training changes; expert parameters
            layer by layer.
        fresh: Expert layers of which all up-vectors are zero.
    """

    stage: str
    digests: dict[str, str]
    fresh: set[int]


class WatchingLog(RunLog):
    """A log, which is told of every step and boundary, that also looks at the state then."""

    def watch(self, trainer: Trainer, optimizers: OptimizersContainer) -> None:
        self.looks: list[Look] = []
        self.auxiliary: dict[str, float] = {}
        self.logged: list[tuple[float, float]] = []
        self.trainer, self.optimizers = trainer, optimizers

    def step(self, stage: str) -> None:
        super().step(stage)
        self.auxiliary[stage] = float(auxiliary_loss(self.trainer.model).detach())

    def record(self, *, stage: str, split: str, **more: Any) -> None:
        super().record(stage=stage, split=split, **more)
        if split == "train":
            self.logged.append((self.auxiliary[stage], more["auxiliary_loss"]))

    def say(self, text: str) -> None:
        super().say(text)
        if begun := re.match(r"stage (.*): steps", text):
            self.look(begun[1])

    def look(self, stage: str) -> None:
        digests: dict[str, str] = {}
        fresh = {1, 2}
        for name, held in parts(training_state(self.trainer.model, self.optimizers)).items():
            stacked = re.search(r"expert_(in|out|keys)$", name)
            for values in (part.values for part in held):
                pieces = dict(enumerate(values, start=1)) if stacked else {0: values}
                for layer, piece in pieces.items():
                    digests[f"{name}.{layer}" if stacked else name] = digest(piece)
                    if name.endswith("expert_out") and piece.any():
                        fresh.discard(layer)
        self.looks.append(Look(stage, digests, fresh))


@dataclass(frozen=True)
class Run:
    """What a rank saw of a whole run.

    Attributes:
        looks: At every boundary and at the end.
        auxiliary: This rank's part of the auxiliary loss in the last step of each stage.
        logged: Its part in each step that was logged, and what was logged.
    """

    looks: list[Look]
    auxiliary: dict[str, float]
    logged: list[tuple[float, float]]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def owner(name: str) -> str:
    """Which of the parts that a stage may freeze a tensor belongs to."""
    if ".sparse." in name:
        return "tables"
    if layer := re.search(r"\.expert_(?:in|out|keys)\.(\d)", name):
        return f"experts {layer[1]}"
    return "routing" if ".query_proj" in name else "backbone"


def train(folder: Path, schedule: StageSchedule, evaluate_every: int | None) -> Run:
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    torch.manual_seed(world.rank)  # dropout must not be the same on every rank
    assembly = assembled(CONFIG)
    log = WatchingLog(folder, STEPS, 0, enabled=world.rank == 0)
    trainer = Trainer(
        assembly.model,
        assembly.optimizers,
        StageTimeline(schedule, total_steps=STEPS, decay=Decay(kind="cosine")),
        intervals=Intervals(log_every=4, evaluate_every=evaluate_every, save_every=None),
        log=log,
        saver=Saver(folder / "checkpoints", keep=1),
    )
    log.watch(trainer, assembly.optimizers)
    training = Loader(toy_source(ROWS), batch_size=BATCH, world=world, prefetch=0)
    validation = Loader(toy_source(33), batch_size=BATCH, world=world, epochs=1, prefetch=0)
    assert trainer.fit(training, validation)
    log.look("")
    return Run(log.looks, log.auxiliary, log.logged)


@pytest.fixture(
    scope="module",
    params=[THREE_STAGES, pytest.param(EACH_ALONE, marks=pytest.mark.slow)],
    ids=["three stages", "own"],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """What both ranks saw, with validations in the middle of stages."""
    return run_ranks(train, 2, tmp_path_factory.mktemp("run"), request.param, 5)


def test_ranks_are_equal_to_the_bit_at_every_boundary_and_at_the_end(runs):
    first, second = (run.looks for run in runs)
    assert [look.stage for look in first] == [look.stage for look in second]
    for mine, other in zip(first, second, strict=True):
        replicated = {name for name in mine.digests if owner(name) != "tables"}
        assert replicated == {name for name in other.digests if owner(name) != "tables"}
        for name in replicated:
            assert mine.digests[name] == other.digests[name], f"{name} entering {mine.stage!r}"


def test_what_is_frozen_keeps_every_bit_and_what_learns_changes(runs):
    """Parameters, tables, the state of every optimizer, and running statistics."""
    for looks in (run.looks for run in runs):
        for before, after in pairwise(looks):
            for name, digest_before in before.digests.items():
                changed = digest_before != after.digests[name]
                learns = owner(name) in LEARN[before.stage]
                assert changed == learns, f"{name} in stage {before.stage!r}"


@pytest.mark.slow
def test_validations_leave_no_trace(runs, tmp_path):
    """Batches that were read ahead of one are trained after it, in their order."""
    schedule = THREE_STAGES if "finetune" in runs[0].auxiliary else EACH_ALONE
    for run, without in zip(runs, run_ranks(train, 2, tmp_path, schedule, None), strict=True):
        assert run == without


def test_an_expert_layer_starts_from_zero_at_its_stage(runs):
    entered = {look.stage: look.fresh for look in runs[0].looks}
    for stage, fresh in entered.items():
        if stage in ("backbone_warmup", "expert_warmup[1]", "tables alone", "1"):
            assert fresh == {1, 2}
        elif stage in ("expert_warmup[2]", "2 alone"):
            assert fresh == {2}
        else:
            assert not fresh


def test_the_auxiliary_loss_is_there_where_experts_compute(runs):
    for stage, loss in runs[0].auxiliary.items():
        assert (loss > 0) == (stage not in ("backbone_warmup", "tables alone")), stage
    for (mine, logged), (other, same) in zip(*(run.logged for run in runs), strict=True):
        assert logged == same == rounded((mine + other) / 2, dtype=torch.float32)
