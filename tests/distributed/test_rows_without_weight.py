"""Rows of weight 0 among the others, on one rank and on two: everything is as if they were not."""

import io
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import distributed as dist
from torch import Tensor

from tests.helpers.datasets import replace_column, SCHEMA, TableSource, toy_table
from tests.helpers.models import in_memory, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.rounding import assert_within, bounds_of, nudged
from tests.helpers.sharded import assembled, joined, load_whole, Part, parts
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.hilomoe.inject import auxiliary_loss, sites_of
from torchrec_hilomoe.models.build import BACKBONES
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.stages import Stage, StageSpan
from torchrec_hilomoe.training.stages.staging import enter_stage
from torchrec_hilomoe.training.trainer import training_state

WEIGHTED = replace(SCHEMA, weight="weight")
ROWS, BATCH = 22, 24  # one batch an epoch, of which each of two ranks reads 11 rows
# Of each epoch, as many: first some of every rank, then all of the second's.
NOWHERE = ({1, 2, 7, *range(12, 19), 20}, set(range(11, 22)))
ALL = Stage(name="all", expert_lr_scale=1.0)


def model_of(backbone: str, routing: Literal["row", "sample"]) -> ModelConfig:
    experts = InjectionConfig(num_layers=2, num_experts=3, sites=("all",), routing=routing)
    return replace(MODEL, backbone=backbone, batch_norm=True, hilomoe=experts)


CASES = {name: model_of(name, "row") for name in BACKBONES}
CASES["bst, by sample"] = model_of("bst", "sample")
BY_FEATURE = InjectionConfig(
    num_layers=2, num_experts=3, routing="sample", route_by=(("kind",), ("views_item",))
)
CASES["bst, by feature"] = replace(CASES["bst, by sample"], hilomoe=BY_FEATURE)


def table_of(nowhere: set[int]) -> pa.Table:
    """Rows whose weight differs; those of weight 0 are unlike anything that is worth learning."""
    table = toy_table(ROWS, seed=3)
    weights = np.where([row in nowhere for row in range(ROWS)], 0.0, 0.5 + np.arange(ROWS) / ROWS)
    for seed, name in enumerate(SCHEMA.dense):
        values = np.random.default_rng(seed).normal(size=ROWS)
        table = replace_column(table, name, pa.array(np.where(weights == 0, 1e30, values)))
    return table.append_column("weight", pa.array(weights))


@dataclass(frozen=True)
class Epochs(TableSource):
    """A block that is another in each epoch."""

    def read(self, epoch: int, block: int) -> pa.Table:
        return self.blocks[epoch]

    @property
    def block_rows(self) -> tuple[int, ...]:
        return (self.blocks[0].num_rows,)


def source(left_out: bool) -> Epochs:
    tables = [table_of(nowhere) for nowhere in NOWHERE]
    if left_out:
        kept = [[row for row in range(ROWS) if row not in nowhere] for nowhere in NOWHERE]
        tables = [table.take(rows) for table, rows in zip(tables, kept, strict=True)]
    return Epochs(tuple(tables), WEIGHTED)


@dataclass(frozen=True)
class Trained:
    """What a rank knows after some steps."""

    losses: list[float]
    auxiliary: list[float]
    counts: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, list[Part]]


def train(model: ModelConfig, whole: dict[str, Tensor], source: Epochs) -> Trained:
    """Train on this rank's share, losses being divided by all rows of a batch."""
    optimizer = TrainConfig(
        batch_size=BATCH,
        learning_rate=0.05,
        table_learning_rate=0.05,
        optimizer="sgd",
        table_optimizer="sgd",
        stages=(ALL,),
    )
    assembly = assembled(RunConfig(model=model, train=optimizer))
    load_whole(assembly.model, whole)
    wrapped = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    assembly.optimizers.set_rates(StageSpan(stage=ALL, start=0, stop=9), 0, decay=1.0)
    pipeline = Pipeline(wrapped, assembly.optimizers.stage_optimizer, wrapped.device)
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    loader = Loader(
        source, batch_size=BATCH, world=world, shuffle=False, epochs=len(NOWHERE), prefetch=0
    )
    batches = (replace(batch, loss_denominator=ROWS / world.size) for batch in loader)
    losses, auxiliary = [], []
    for _ in NOWHERE:
        losses.append(pipeline.step(batches).loss.item())
        auxiliary.append(auxiliary_loss(wrapped).item())
    pipeline.detach()
    records = {name: site.routing_record for name, site in sites_of(wrapped.module).items()}
    task = wrapped.module
    assert isinstance(task, TrainTask)
    tables = set(task.model.sparse.tables)
    return Trained(
        losses=losses,
        auxiliary=auxiliary,
        counts={name: record.counts_LE.clone() for name, record in records.items() if record},
        gradients={
            name: p.grad.clone()
            for name, p in wrapped.module.named_parameters()
            if p not in tables and p.grad is not None
        },
        state=parts(training_state(wrapped, assembly.optimizers)),
    )


Cases = dict[str, Trained]


def train_each(wholes: bytes, left_out: bool) -> Cases:
    loaded = torch.load(io.BytesIO(wholes))
    return {case: train(model, loaded[case], source(left_out)) for case, model in CASES.items()}


@pytest.fixture(scope="module")
def wholes() -> bytes:
    torch.manual_seed(4)
    found = {}
    for case, model in CASES.items():
        task = in_memory(model)
        with torch.no_grad():  # what starts at zero, or near it, would hide errors in the rest
            for name, parameter in task.named_parameters():
                if name.endswith("expert_out"):
                    parameter.normal_(std=0.3)
                if ".sparse." in name:
                    parameter.mul_(10)
        found[case] = task.state_dict()
    saved = io.BytesIO()
    torch.save(found, saved)
    return saved.getvalue()


@pytest.fixture(scope="module")
def without(wholes: bytes) -> Cases:
    (alone,) = run_ranks(train_each, 1, wholes, True)
    return alone


@pytest.fixture(scope="module")
def moved(wholes: bytes) -> list[Cases]:
    """From weights that were moved by a unit of roundoff: norms make much of that, some of them."""
    torch.manual_seed(5)
    others = []
    for _ in range(2):
        saved = io.BytesIO()
        torch.save(nudged(torch.load(io.BytesIO(wholes))), saved)
        others += run_ranks(train_each, 1, saved.getvalue(), True)
    return others


@pytest.fixture(scope="module")
def two(wholes: bytes) -> list[Cases]:
    return run_ranks(train_each, 2, wholes, False)


@pytest.fixture(scope="module")
def one(wholes: bytes) -> Cases:
    (alone,) = run_ranks(train_each, 1, wholes, False)
    return alone


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_rank_trains_as_without_them_to_the_bit(without, one, case):
    want, got = without[case], one[case]
    assert (got.losses, got.auxiliary) == (want.losses, want.auxiliary)
    for kind in ("counts", "gradients"):
        assert getattr(got, kind).keys() == getattr(want, kind).keys()
        for name, tensor in getattr(want, kind).items():
            assert torch.equal(getattr(got, kind)[name], tensor), name
    state = joined([got.state])
    for name, tensor in joined([want.state]).items():
        assert torch.equal(state[name], tensor), name


def numbers(ranks: list[Trained]) -> dict[str, Tensor]:
    """What was computed in floating point, by all ranks together."""
    (first, *_), state = ranks, joined([rank.state for rank in ranks])
    means = {
        name: torch.tensor(np.mean([getattr(rank, name) for rank in ranks], axis=0)).float()
        for name in ("losses", "auxiliary")
    }
    gradients = {f"gradients.{name}": gradient for name, gradient in first.gradients.items()}
    return {**means, **gradients, **state}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_without_them_to_rounding(without, moved, two, case):
    want, ranks = without[case], [rank[case] for rank in two]
    assert want.counts
    for rank in ranks:
        for name, counts_LE in want.counts.items():
            assert torch.equal(rank.counts[name], counts_LE), name
        for name, gradient in ranks[0].gradients.items():
            assert torch.equal(rank.gradients[name], gradient), name
    found = numbers([want])
    longest = max(max(tensor.shape, default=1) for tensor in found.values())
    rounding = bounds_of(found, [numbers([other[case]]) for other in moved], longest)
    assert_within(numbers(ranks), found, rounding)
