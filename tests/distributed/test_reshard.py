"""A checkpoint is of no number of ranks and no way to cut tables: others load it to the bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import batches, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, of_sums
from tests.helpers.sharded import assembled, joined, Part, parts
from torchrec_hilomoe.config import RunConfig, ShardingConfig, TableSharding, TrainConfig
from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress, Saver
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

ALL = Stage(name="all")
WIDTH = 16
UNPOOLED, POOLED = ("item", "kind"), ("user", "place", "tag")
Way = Literal["row_wise", "table_wise", "column_wise"]
Held = Mapping[str, list[Part]]


def config_of(way: Way | Literal["mixed"]) -> RunConfig:
    """Every table cut in one way, pooled ones not by rows; ``mixed``: not as its neighbour."""
    ways: tuple[Way, ...] = ("column_wise", "table_wise") if way == "mixed" else (way,)
    types: dict[str, Way] = {
        name: ways[at % len(ways)] for at, name in enumerate(UNPOOLED + POOLED)
    }
    for name in POOLED if way == "row_wise" else ():
        types[name] = "table_wise"
    everywhere = tuple(reversed(range(dist.get_world_size())))  # else columns are few enough
    tables = {
        name: TableSharding(type=found, ranks=everywhere if found == "column_wise" else None)
        for name, found in types.items()
    }
    return RunConfig(
        model=replace(MODEL, embedding_dim=WIDTH),
        sharding=ShardingConfig(tables=tables),
        train=TrainConfig(batch_size=16, learning_rate=0.01),
    )


def train_and_save(folder: Path, way: Way) -> Held:
    assembly = assembled(config_of(way))
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    source = batches(64, 16, world=world)
    for _ in range(3):
        pipeline.step(source)
    pipeline.detach()
    state = training_state(model, assembly.optimizers)
    position = LoaderState(epoch=0, lane_rows=1, num_canonical_shards=4)
    Saver(folder).save(state, Progress(step=3, stage="all", position=position, total_steps=3))
    return parts(state)


def load(folder: Path, way: Way) -> Held:
    assembly = assembled(config_of(way))
    state = training_state(assembly.model, assembly.optimizers)
    checkpoint.open(folder / "step_3").load(state)
    return parts(state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            (4, "mixed"),
            [(1, "table_wise"), (2, "row_wise"), (4, "column_wise")],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, "column_wise"),
            [(1, "row_wise"), (2, "table_wise"), (4, "mixed")],
            marks=pytest.mark.slow,
        ),
        ((1, "table_wise"), [(2, "column_wise"), (4, "row_wise")]),
    ],
    ids=lambda it: "-".join(map(str, it)) if isinstance(it, tuple) else "",
)
def test_ranks_and_ways_of_cutting_do_not_matter(tmp_path, before, after):
    ranks, way = before
    saved = joined(run_ranks(train_and_save, ranks, tmp_path, way))
    assert any("momentum" in name and tensor.any() for name, tensor in saved.items())
    resharded = 0
    for others, other_way in after:
        loaded = joined(run_ranks(load, others, tmp_path, other_way))
        assert loaded.keys() == saved.keys()
        for name, it in loaded.items():
            if it.shape == saved[name].shape:
                assert torch.equal(it, saved[name]), (name, others, other_way)
            else:
                assert_same_means(it, saved[name], name)
                resharded += 1
    assert resharded


def assert_same_means(loaded: Tensor, saved: Tensor, name: str) -> None:
    """Row-wise state of tables cut by columns: every column of the table has its mean."""
    assert name.endswith(".momentum1")
    rows = SCHEMA.tables[name.split(".")[-2]]
    by_column = saved.view(-1, rows).repeat_interleave(WIDTH * rows // len(saved), dim=0)
    pieces = len(loaded) // rows
    want = by_column.double().view(pieces, WIDTH // pieces, rows).mean(dim=1).flatten()
    unit = of_sums(WIDTH) * torch.finfo(torch.float32).eps
    assert_within(loaded, want, unit * want)
