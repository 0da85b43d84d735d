"""Given vectors on two ranks: loaded by parts, never moved by training, equal to one process."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.datasets import SCHEMA, TableSource, toy_table, write_folder
from tests.helpers.models import MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.sharded import joined, Part, parts
from torchrec_hilomoe.config import DataConfig, InjectionConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.schema import FrozenTable, Schema
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.assemble import assemble
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

STEPS, BATCH = 3, 24
ALL = Stage(name="all")
FROZEN = replace(
    SCHEMA,
    frozen={
        "kind": FrozenTable(width=8, file="kind.npy"),
        "tag": FrozenTable(width=12, file="tag.npy"),
    },
)


@dataclass(frozen=True)
class Trained:
    """A rank's state before and after some steps."""

    before: dict[str, list[Part]]
    after: dict[str, list[Part]]


def train(folder: str, schema: Schema) -> Trained:
    config = RunConfig(
        data=DataConfig(path=folder),
        model=replace(MODEL, hilomoe=InjectionConfig(enabled=False)),
        train=TrainConfig(batch_size=BATCH, table_learning_rate=0.5),
    )
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    torch.manual_seed(0)
    context = DistributedContext(world=world, device=torch.device("cpu"))
    assembly = assemble(config, build_task(config.model, schema), context)
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    assembly.optimizers.set_rates(StageSpan(stage=ALL, start=0, stop=STEPS), 0, decay=1.0)
    before = parts(training_state(model, assembly.optimizers))
    source = TableSource((toy_table(STEPS * BATCH),), schema)
    batches = iter(Loader(source, batch_size=BATCH, world=world, prefetch=0))
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    for _ in range(STEPS):
        pipeline.step(batches)
    pipeline.detach()
    return Trained(before, parts(training_state(model, assembly.optimizers)))


@pytest.mark.slow
def test_given_vectors_are_loaded_by_parts_and_stay(tmp_path: Path):
    folder = write_folder(tmp_path / "data", {"train": [toy_table(9)]})
    FROZEN.save(str(folder / "schema.json"))
    given: dict[str, Tensor] = {}
    for name, table in FROZEN.frozen.items():
        vectors = np.random.default_rng(1).normal(size=(FROZEN.tables[name], table.width))
        np.save(folder / table.file, vectors.astype(np.float32))
        given[name] = torch.from_numpy(vectors.astype(np.float32))
    ranks = run_ranks(train, 2, str(folder), FROZEN)
    before, after = joined([rank.before for rank in ranks]), joined([rank.after for rank in ranks])
    assert before.keys() == after.keys()
    for name, want in given.items():
        keys = [key for key in after if ".given." in key and key.endswith(f".{name}.weight")]
        assert len(keys) == 1, keys
        assert torch.equal(before[keys[0]], want)
        assert torch.equal(after[keys[0]], want)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("projections.clicks_kind" in key for key in moved)
    assert any(key.endswith("item.weight") for key in moved)
