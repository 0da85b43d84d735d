"""A plan on real ranks: tables are where they are wanted, and every rank is told why not."""

from dataclasses import dataclass, replace

from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.helpers.models import batches, MODEL
from tests.helpers.processes import run_ranks
from tests.helpers.sharded import assembled
from torchrec_hilomoe.config import RunConfig, ShardingConfig, TableSharding
from torchrec_hilomoe.runtime.world import World
from torchrec_hilomoe.training.pipelines.pipeline import Pipeline
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
from torchrec_hilomoe.training.stages import Stage
from torchrec_hilomoe.training.stages.staging import enter_stage

ALL = Stage(name="all")
WANTED = {
    "user": TableSharding(type="table_wise", ranks=(1,)),
    "place": TableSharding(type="table_wise", ranks=(0,)),
    "tag": TableSharding(type="column_wise", ranks=(1, 0)),
    "item": TableSharding(type="row_wise"),
    "kind": TableSharding(type="column_wise", ranks=(1, 0)),
}
CONFIG = RunConfig(model=replace(MODEL, embedding_dim=8), sharding=ShardingConfig(tables=WANTED))


@dataclass(frozen=True)
class Seen:
    """Of one rank: the report, whose rows it holds, a loss, and what it was told."""

    report: PlanReport
    held: dict[str, list[int]]
    loss: float
    told: str


def plan_and_train() -> Seen:
    assembly = assembled(CONFIG)
    held = {}
    for name, value in assembly.model.state_dict().items():
        if isinstance(value, ShardedTensor):
            shards = sorted(value.metadata().shards_metadata, key=lambda it: it.shard_offsets)
            held[name.split(".")[-2]] = [
                shard.placement.rank() for shard in shards if shard.placement
            ]
    model = enter_stage(assembly.model, ALL)
    assembly.optimizers.enter(ALL)
    pipeline = Pipeline(model, assembly.optimizers.stage_optimizer, model.device)
    world = World(rank=dist.get_rank(), size=dist.get_world_size())
    output = pipeline.step(batches(16, 16, world=world))
    pipeline.detach()
    wrong = replace(CONFIG, sharding=ShardingConfig(ddr="1KB"))
    told = ""
    try:
        assembled(wrong)
    except ValueError as error:
        told = str(error)
    return Seen(assembly.plan, held, output.loss.item(), told)


def test_tables_are_where_they_are_wanted_and_every_rank_knows():
    first, second = run_ranks(plan_and_train, 2)
    assert first.report == second.report
    planned = {table.table: table for table in first.report.tables}
    for name, wanted in WANTED.items():
        assert planned[name].type == wanted.type
        ranks = wanted.ranks or (0, 1)
        assert planned[name].ranks == ranks
        assert first.held[name] == second.held[name] == list(ranks)
    assert first.loss > 0
    assert second.loss > 0
    # A plan is made on one rank: the others must not wait for it for ever.
    assert first.told == second.told
    assert "sharding: table 'item' (20 rows of 8) needs" in first.told
    assert "sharding.ddr = 1KB" in first.told
