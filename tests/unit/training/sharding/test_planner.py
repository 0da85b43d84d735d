"""Plans: what the user wants is done, or refused with the table, the limit and what would help."""

import re
from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import ShardingConfig, TableSharding, TrainConfig
from torchrec_hilomoe.config.sharding import parse_bytes
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.training.sharding.capabilities import Machine
from torchrec_hilomoe.training.sharding.plan_report import PlanReport
from torchrec_hilomoe.training.sharding.planner import make_plan, tables_by_module
from torchrec_hilomoe.training.sharding.shard import sharders_of

CPU = Machine(world_size=4, local_world_size=4, device="cpu")
GPUS = Machine(world_size=4, local_world_size=2, device="cuda")
TABLES = {"item", "kind", "user", "place", "tag"}
META = torch.device("meta")


def plan(machine: Machine = CPU, *, width: int = 64, batch_size: int = 32, **options):
    task = build_task(replace(MODEL, embedding_dim=width), SCHEMA)
    options = {"hbm": "1GB", "ddr": "4GB", **options}
    return make_plan(task, machine, ShardingConfig(**options), batch_size=batch_size)


def placed(planned) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {t.table: (t.type, t.kernel, t.ranks) for t in planned.report.tables}


@pytest.mark.parametrize("machine", [CPU, GPUS], ids=["cpu", "cuda"])
def test_every_table_is_planned_and_reported(machine):
    planned = plan(machine)
    by_module = tables_by_module(planned.plan)
    assert {table for tables in by_module.values() for table in tables} == TABLES
    report = planned.report
    assert {table.table for table in report.tables} == TABLES
    for table in report.tables:
        parameter = by_module[table.collection][table.table]
        assert (table.type, table.kernel) == (parameter.sharding_type, parameter.compute_kernel)
        assert list(table.ranks) == parameter.ranks
        assert table.rows == SCHEMA.tables[table.table]
        assert table.weight_bytes == table.rows * 64 * 4 <= table.bytes
        assert table.milliseconds > 0
    assert sum(report.rank_bytes) == sum(table.bytes for table in report.tables)
    memory = "1GB" if machine.device == "cuda" else "4GB"
    # On GPUs, TorchRec counts host memory too: rows may be there.
    host = parse_bytes("4GB", "") if machine.device == "cuda" else 0
    # Each of a share and a percentage is cut to whole bytes, on either kind of memory.
    assert 0 <= (parse_bytes(memory, "") + host) * 0.6 - report.capacity_bytes < 4
    assert report.imbalance >= 1


def test_a_report_is_readable_and_comes_back_from_json():
    report = plan(tables={"item": TableSharding(type="row_wise")}).report
    assert PlanReport.from_json(report.to_json()) == report
    lines = report.text().splitlines()
    assert re.fullmatch("table +rows +width +memory +type +kernel +ranks +est. ms", lines[0])
    (item,) = [line for line in lines if ".item " in line]
    assert re.search(r"unpooled\.item +20 +64 +[\d.]+ KB +row_wise +fused +0-3 +\d", item)
    assert sum(line.startswith("rank ") for line in lines) == 4


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (TableSharding(type="table_wise"), ("table_wise", "fused", 1)),
        (TableSharding(type="row_wise"), ("row_wise", "fused", 4)),
        (TableSharding(type="table_wise", ranks=(3,)), ("table_wise", "fused", (3,))),
        (TableSharding(type="column_wise", ranks=(2, 0)), ("column_wise", "fused", (2, 0))),
    ],
)
def test_a_table_goes_where_it_is_wanted(wanted, got):
    kind, kernel, ranks = placed(plan(tables={"item": wanted}))["item"]
    assert (kind, kernel) == got[:2]
    assert (len(ranks) if isinstance(got[2], int) else ranks) == got[2]


def test_pinned_tables_are_taken_into_account_for_the_others():
    """Two large tables on rank 0: what is free goes elsewhere."""
    pinned = TableSharding(type="table_wise", ranks=(0,))
    only = TableSharding(type="table_wise")
    wanted = {"item": pinned, "user": pinned, "kind": only, "place": only, "tag": only}
    found = placed(plan(tables=wanted))
    assert found["item"][2] == found["user"][2] == (0,)
    assert all(found[name][2] != (0,) for name in ("kind", "place", "tag"))


def test_kernels_and_multi_host_types_are_for_those_who_ask():
    caching = TableSharding(kernel="fused_uvm_caching")
    grid = TableSharding(type="table_row_wise")
    found = placed(plan(GPUS, tables={"item": caching, "user": grid}))
    assert found["item"][1] == "fused_uvm_caching"
    assert found["user"][0] == "table_row_wise"
    assert found["kind"][1] == "fused"


def test_faster_links_are_believed():
    def slowest(**options) -> float:
        only = {name: TableSharding(type="table_wise") for name in TABLES}
        return max(plan(GPUS, tables=only, batch_size=4096, **options).report.rank_milliseconds)

    assert slowest(inter_host_bandwidth=1, intra_host_bandwidth=1) > 2 * slowest(
        inter_host_bandwidth=100, intra_host_bandwidth=100
    )
    assert slowest(hbm_bandwidth=10) > slowest(hbm_bandwidth=2000)


@pytest.mark.parametrize(
    ("machine", "tables", "message"),
    [
        (CPU, {"itme": TableSharding()}, "no table 'itme'. Did you mean 'item'?"),
        (
            CPU,
            {"user": TableSharding(type="row_wise")},
            "sharding.tables.user: type 'row_wise' does not train a pooled table on cpu; use one "
            "of table_wise, column_wise, or null.",
        ),
        (
            GPUS,
            {"item": TableSharding(type="grid_shard")},
            "sharding.tables.item: type 'grid_shard' does not train a sequence table on cuda",
        ),
        (
            CPU,
            {"item": TableSharding(kernel="fused_uvm")},
            "sharding.tables.item: kernel 'fused_uvm' does not exist on cpu; use fused, or null.",
        ),
        (
            CPU,
            {"item": TableSharding(type="table_wise", ranks=(4,))},
            "sharding.tables.item: ranks = (4,) names rank 4, but the job has ranks 0 to 3.",
        ),
        (
            CPU,
            {"item": TableSharding(type="column_wise", ranks=(0, 1, 2))},
            "width 64 cannot be cut into 3 columns that are multiples of 4",
        ),
    ],
)
def test_what_cannot_be_wanted_is_refused(machine, tables, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(machine, tables=tables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "row_wise", "ranks": (0,)}, "ranks can be chosen for table_wise (one)"),
        ({"ranks": (0,)}, "ranks = (0,) with type = None"),
        ({"type": "table_wise", "ranks": (0, 1)}, "a whole table is on one rank"),
        ({"type": "column_wise", "ranks": (0, 0)}, "must be different ranks, counted from 0"),
        ({"type": "column_wise", "ranks": ()}, "must be different ranks, counted from 0"),
    ],
)
def test_an_impossible_constraint_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TableSharding(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve": 1.0}, "sharding.reserve must be at least 0 and below 1, got 1.0"),
        ({"hbm": "many"}, "sharding.hbm is 'many', which is no amount of memory; write it as 80GB"),
        ({"ddr": "0"}, "sharding.ddr must be above 0, got '0'"),
        ({"hbm_bandwidth": 0}, "sharding.hbm_bandwidth must be above 0 GB/s, got 0"),
    ],
)
def test_an_impossible_machine_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardingConfig(**options)


def large(rows: int, tables: int = 1) -> torch.nn.ModuleDict:
    """Sequence tables that nothing holds: only their sizes matter."""
    configs = [
        EmbeddingConfig(
            name=f"huge{i}", embedding_dim=64, num_embeddings=rows, feature_names=[f"f{i}"]
        )
        for i in range(tables)
    ]
    return torch.nn.ModuleDict({"sparse": EmbeddingCollection(tables=configs, device=META)})


def test_a_table_that_is_too_large_is_named_with_the_limit_and_what_would_help():
    """10 million rows of 64 floats are 2.4 GB, on four ranks 0.6 GB each, beside 0.3 GB."""
    message = (
        r"sharding: table 'huge0' \(10,000,000 rows of 64\) needs \d+\.\d MB of host memory on one "
        r"rank even when it is cut row_wise, \d+\.\d MB more than the 307.2 MB that a rank has for "
        r"tables \(sharding.hbm = null, sharding.ddr = 0.5GB, less sharding.reserve = 0.4\). What "
        r"would help: more ranks, more memory.* a lower sharding.reserve,.*hilomoe plan tries each"
    )
    with pytest.raises(ValueError, match=message):
        make_plan(large(10_000_000), CPU, ShardingConfig(ddr="0.5GB"), batch_size=32)
    make_plan(large(10_000_000), CPU, ShardingConfig(ddr="2GB"), batch_size=32)


def test_a_constraint_that_makes_it_too_large_is_told():
    whole = ShardingConfig(ddr="2GB", tables={"huge0": TableSharding(type="table_wise")})
    with pytest.raises(
        ValueError, match="even when it is cut table_wise, .*help: no constraint on huge0"
    ):
        make_plan(large(10_000_000), CPU, whole, batch_size=32)


def test_tables_that_do_not_fit_together_are_added_up():
    pinned = {"huge2": TableSharding(type="table_wise", ranks=(0,))}
    message = (
        r"sharding: the tables need \d+\.\d GB of host memory together, \d+\.\d MB more than the "
        r"1.2 GB that 4 ranks have .* The largest is table 'huge0' .*"
        r"What would help: no constraint on huge2 \(sharding.tables\), more ranks"
    )
    options = ShardingConfig(ddr="0.5GB", tables=pinned)
    with pytest.raises(ValueError, match=message):
        make_plan(large(1_000_000, tables=9), CPU, options, batch_size=32)


def test_two_collections_with_one_name_are_refused():
    both = large(100)
    config = EmbeddingBagConfig(
        name="huge0", embedding_dim=64, num_embeddings=100, feature_names=["g"]
    )
    both["pooled"] = EmbeddingBagCollection(tables=[config], device=META)
    with pytest.raises(ValueError, match="table 'huge0' is in two collections"):
        make_plan(both, CPU, ShardingConfig(ddr="1GB"), batch_size=32)


class OfOnesOwn(EmbeddingBagCollection):
    """TorchRec shards its own classes and no other."""


def test_a_table_that_would_not_be_sharded_is_refused():
    both = large(100)
    config = EmbeddingBagConfig(name="own", embedding_dim=64, num_embeddings=9, feature_names=["g"])
    both["own"] = OfOnesOwn(tables=[config], device=META)
    with pytest.raises(ValueError, match="tables own are in the model or in the plan, not in both"):
        make_plan(both, CPU, ShardingConfig(ddr="1GB"), batch_size=32)


@pytest.mark.parametrize(("ranks", "rows"), [(128, 10_000_000_000)])
def test_a_machine_that_is_not_there_can_be_planned_for(ranks, rows):
    machine = Machine(world_size=ranks, local_world_size=8, device="cuda")
    report = make_plan(large(rows), machine, ShardingConfig(hbm="80GB"), batch_size=512).report
    (table,) = report.tables
    assert table.type == "row_wise"
    assert len(table.ranks) == ranks
    assert "0-127" in report.text()


def test_kernels_are_told_what_they_must_be_able_to_do():
    train = TrainConfig(pipeline="prefetch", table_weight_decay=0.1)
    for sharder in sharders_of(train):
        assert isinstance(sharder, EmbeddingBagCollectionSharder | EmbeddingCollectionSharder)
        assert sharder.fused_params is not None
        assert sharder.fused_params["prefetch_pipeline"] is True
        assert sharder.fused_params["weight_decay_mode"] is WeightDecayMode.L2
    for sharder in sharders_of(TrainConfig(pipeline="prefetch", debug=True)):
        assert isinstance(sharder, EmbeddingBagCollectionSharder | EmbeddingCollectionSharder)
        assert not sharder.fused_params or "prefetch_pipeline" not in sharder.fused_params
