"""A run resumed just before, at and after each boundary ends with the bits of one that was not.

Everything that a stage can change is in the schedule: a plateau that ends one early, another
optimizer, a layer alone, frozen parts, and in some variants micro-batches and a loss scale.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.helpers.datasets import toy_source
from tests.helpers.models import MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.sharded import assembled, parts
from torchrec_hilomoe.config import InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Saver
from torchrec_hilomoe.training.log.run_log import RunLog
from torchrec_hilomoe.training.pipelines.pipeline import PipelineOptions
from torchrec_hilomoe.training.stages import (
    Decay,
    PlateauConfig,
    Stage,
    StageSchedule,
    StageTimeline,
)
from torchrec_hilomoe.training.trainer import Intervals, Trainer, training_state

STEPS, BATCH, ROWS, EVERY = 12, 16, 100, 2
FROZEN: dict[str, Any] = {"train_backbone": False, "train_tables": False}
STAGES = (
    # No metric gains 2: the second validation, after step 4, ends it.
    Stage(
        name="until a plateau",
        steps=8,
        active_layers=0,
        plateau=PlateauConfig(metric="logloss", patience=1, min_delta=2.0),
    ),
    Stage(name="layer 1 by sgd", steps=2, active_layers=1, optimizer="sgd", **FROZEN),
    Stage(
        name="layer 2 alone",
        steps=2,
        learning_layers=(2,),
        decay=Decay(kind="linear"),
        **FROZEN,
    ),
    Stage(name="all", optimizer="adamw", weight_decay=0.1, warmup_steps=2),
)
BOUNDARIES = (4, 6, 8)
AROUND = tuple(sorted({step + off for step in BOUNDARIES for off in (-1, 0, 1)}))
# What learns between two boundaries, by the words in the names of its tensors.
LEARN = {
    4: {"sparse", "backbone"},
    6: {"experts 1", "routing"},
    8: {"experts 2", "routing"},
    STEPS: {"sparse", "backbone", "experts 1", "experts 2", "routing"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one batch a step": {},
    "micro-batches": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "fp16": {"precision": "fp16", "pipeline": "base"},
}


@dataclass(frozen=True)
class Seen:
    """What a rank holds after some steps: a digest of each tensor, by name."""

    digests: dict[str, str]
    schedule: Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """Of one rank: at each boundary of the run without a stop, and at the end of every run."""

    looks: dict[int, Seen]
    whole: Seen
    resumed: dict[int, Seen]


class WatchingTrainer:
    """A trainer of the toy model, and what it holds at some steps."""

    def __init__(self, folder: Path, options: Mapping[str, Any], save_every: int | None) -> None:
        self.world = World(rank=dist.get_rank(), size=dist.get_world_size())
        torch.manual_seed(self.world.rank)  # dropout must not be the same on every rank
        self.config = RunConfig(
            model=replace(
                MODEL,
                batch_norm=True,
                dropout=0.1,
                hilomoe=InjectionConfig(num_layers=2, num_experts=4, query_dim=3),
            ),
            train=TrainConfig(batch_size=BATCH, learning_rate=0.01, stages=STAGES, **options),
        )
        self.assembly = assembled(self.config)
        self.timeline = StageTimeline(
            StageSchedule(stages=STAGES), total_steps=STEPS, evaluate_every=EVERY
        )
        self.looks: dict[int, Seen] = {}
        train = self.config.train
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(
            self.assembly.model,
            self.assembly.optimizers,
            self.timeline,
            intervals=Intervals(log_every=3, evaluate_every=EVERY, save_every=save_every),
            log=_Log(folder, self),
            saver=Saver(folder / "checkpoints", keep=100),
            pipelining=PipelineOptions(
                kind=train.pipeline, gradient_accumulation_steps=train.gradient_accumulation_steps
            ),
        )

    def run(self) -> Seen:
        start = self.trainer.position
        training = Loader(
            toy_source(ROWS), batch_size=BATCH, world=self.world, start=start, prefetch=0
        )
        validation = Loader(
            toy_source(33), batch_size=BATCH, world=self.world, epochs=1, prefetch=0
        )
        assert self.trainer.fit(training, validation)
        assert self.trainer.step == STEPS
        return self.seen()

    def seen(self) -> Seen:
        digests = {}
        state = training_state(self.trainer.model, self.assembly.optimizers)
        for name, held in parts(state).items():
            for part in held:
                stacked = name.rpartition(".")[2] in ("expert_in", "expert_out", "expert_keys")
                pieces = dict(enumerate(part.values, start=1)) if stacked else {0: part.values}
                for layer, piece in pieces.items():
                    digest = hashlib.sha256(piece.numpy().tobytes()).hexdigest()
                    digests[f"{name}.{layer}" if stacked else name] = digest
        return Seen(digests, self.timeline.state_dict(STEPS))


class _Log(RunLog):
    """Looks at the state where a stage begins."""

    def __init__(self, folder: Path, watched: WatchingTrainer) -> None:
        super().__init__(folder, STEPS, 0, enabled=False)
        self._watched = watched

    def say(self, text: str) -> None:
        if text.startswith("stage ") and ": steps" in text:
            self._watched.looks[self._watched.trainer.step] = self._watched.seen()


def train_and_resume(folder: Path, options: Mapping[str, Any], steps: tuple[int, ...]) -> Runs:
    first = WatchingTrainer(folder / "whole", options, save_every=1)
    whole = first.run()
    resumed = {}
    for step in steps:
        path = folder / "whole" / "checkpoints" / f"step_{step}"
        again = WatchingTrainer(folder / f"from {step}", options, save_every=None)
        again.trainer.load(checkpoint.open(path))
        assert again.trainer.step == step
        resumed[step] = again.run()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"from {step}")
    return Runs(first.looks | {STEPS: whole}, whole, resumed)


def check(runs: list[Runs]) -> None:
    """Resumed equals uninterrupted, frozen stays, ranks are equal: each to the bit."""
    for rank, mine in enumerate(runs):
        assert list(mine.looks) == [0, *BOUNDARIES, STEPS]
        assert mine.whole.schedule["ended"] == {"until a plateau": 4}
        for step, end in mine.resumed.items():
            assert end.schedule == mine.whole.schedule
            assert end.digests.keys() == mine.whole.digests.keys()
            differing = [n for n, it in end.digests.items() if it != mine.whole.digests[n]]
            assert not differing, f"rank {rank}, resumed at step {step}: {differing[:5]}"
        for (_, before), (step, after) in pairwise(mine.looks.items()):
            changed = {n for n, it in before.digests.items() if it != after.digests[n]}
            for name in changed:
                assert name.startswith("loss_scale") or owner(name) in LEARN[step], name
            for part in LEARN[step]:
                assert any(owner(name) == part for name in changed), (part, step)
    for other in runs[1:]:
        for step, look in runs[0].looks.items():
            for name, digest in look.digests.items():
                if ".sparse." not in name:
                    assert other.looks[step].digests[name] == digest, (name, step)


def owner(name: str) -> str:
    """Which of the parts that a stage may freeze a tensor belongs to."""
    if ".sparse." in name:
        return "sparse"
    last = name.split(".")
    for kind in ("expert_in", "expert_out", "expert_keys"):
        if kind in last:
            return f"experts {last[last.index(kind) + 1]}"
    return "routing" if "query_proj" in last else "backbone"


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """Each boundary, and a step after one; the slow tests go around it, in every variant."""
    check(run_ranks(train_and_resume, 2, tmp_path, {}, (3, 4, 5, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_boundary_in_every_variant(tmp_path, ranks, variant):
    runs = run_ranks(train_and_resume, ranks, tmp_path, VARIANTS[variant], AROUND, timeout=400)
    check(runs)


def test_the_schedule_is_in_the_checkpoint(tmp_path):
    runs = run_ranks(train_and_resume, 1, tmp_path, VARIANTS["micro-batches"], (4,))
    check(runs)
    folder = tmp_path / "whole" / "checkpoints"
    at_3, at_4 = (checkpoint.open(folder / f"step_{step}").progress for step in (3, 4))
    assert at_3.schedule["ended"] == {}
    assert at_3.schedule["waited"] == 0
    assert at_4.schedule["ended"] == {"until a plateau": 4}
    assert at_4.stage == "until a plateau"
