"""Estimates: they add up, they move where they should, and the largest batch is the largest."""

import json
import re
import time
from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from tests.helpers.rounding import rounded
from torchrec_hilomoe.config import (
    InjectionConfig,
    ModelConfig,
    RunConfig,
    ShardingConfig,
    TableSharding,
    TrainConfig,
)
from torchrec_hilomoe.config.sharding import parse_bytes
from torchrec_hilomoe.data.schema import FrozenTable, Schema
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run, with_rows
from torchrec_hilomoe.planning.run_plan import plan_text, RunPlan
from torchrec_hilomoe.training.sharding.shortage import NoPlanError

LARGE = with_rows(SCHEMA, ["item=2e6", "user=1000000"])
TABLES = ("item", "kind", "user", "place", "tag")
EIGHT = Cluster(world_size=8, hosts=2)
WIDE = replace(MODEL, embedding_dim=64)


def planned(
    cluster: Cluster = EIGHT,
    *,
    schema: Schema = LARGE,
    model: ModelConfig = WIDE,
    batch_size: int = 8192,
    train: TrainConfig | None = None,
    **sharding,
) -> RunPlan:
    train = replace(train or TrainConfig(), batch_size=batch_size)
    options = ShardingConfig(**{"hbm": "80GB", "ddr": "64GB", **sharding})
    return plan_run(RunConfig(model=model, train=train, sharding=options), schema, cluster)


def test_parts_add_up_to_torchrecs_totals():
    plan = planned()
    assert (plan.rows, plan.capacity) == (1024, parse_bytes("80GB", ""))
    for rank, held, busy in zip(
        plan.ranks, plan.report.rank_bytes, plan.report.rank_milliseconds, strict=True
    ):
        assert rank.time.total == rounded(busy, terms=len(TABLES))
        assert sum(rank.tables.values()) == rank.memory.device
        # TorchRec spreads a row's state over the columns that a table is cut into.
        assert abs(rank.memory.device - held) <= rank.memory.state
    rows = {table.table: table.weight_bytes for table in plan.report.tables}
    assert sum(rank.memory.tables for rank in plan.ranks) == sum(rows.values())
    assert rows["item"] == 2_000_000 * 64 * 4
    step = plan.step
    assert step.serial == rounded(sum(step.parts.values()), terms=len(step.parts))
    assert step.overlapped == step.parts[step.bound] < step.serial


def test_what_is_saved_and_looked_up_grows_with_the_batch_and_the_rest_does_not():
    small, large = planned(batch_size=8192), planned(batch_size=16384)
    assert large.dense == small.dense
    for few, many in zip(small.ranks, large.ranks, strict=True):
        assert (many.memory.tables, many.memory.state) == (few.memory.tables, few.memory.state)
        assert many.memory.lookups == 2 * few.memory.lookups
    saved = [plan.activations.bytes(plan.rows) for plan in (small, large)]
    assert 0 <= 2 * saved[0] - saved[1] < saved[0] / small.rows  # less than a row is for the batch


@pytest.mark.parametrize(
    ("cluster", "options", "bound"),
    [
        (EIGHT, {"inter_host_bandwidth": 0.01}, "network"),
        (EIGHT, {"inter_host_bandwidth": 1e4, "intra_host_bandwidth": 1e4}, "memory"),
        (replace(EIGHT, device_flops=1e9), {}, "compute"),
        (replace(EIGHT, utilization=1e-6), {}, "compute"),
    ],
)
def test_the_scarce_resource_bounds_the_step(cluster, options, bound):
    flops = {"device_flops": 1e18} if bound == "memory" else {}
    plan = planned(replace(cluster, **flops), **options)
    assert plan.step.bound == bound
    assert f"bound by {bound}: " in plan_text(plan)


def test_one_rank_exchanges_no_gradients_and_micro_batches_average_once():
    alone = planned(Cluster()).step
    assert (alone.exchange, alone.all_reduce) == (0, 0)
    assert planned().step.exchange > 0
    whole = planned(batch_size=8192).step
    cut = planned(batch_size=16384, train=TrainConfig(gradient_accumulation_steps=2)).step
    assert cut.samples == 2 * whole.samples
    assert cut.all_reduce == whole.all_reduce
    assert cut.compute == 2 * whole.compute
    assert cut.lookup == rounded(2 * whole.lookup, terms=len(TABLES))


@pytest.mark.parametrize(("memory", "headroom"), [("400MB", 0.1), ("600MB", 0.5)])
def test_the_largest_batch_fits_and_one_row_more_does_not(memory, headroom):
    cluster = Cluster(world_size=2, headroom=headroom)
    where = {
        name: TableSharding(type="table_wise", ranks=(i % 2,)) for i, name in enumerate(TABLES)
    }
    found = planned(cluster, schema=SCHEMA, batch_size=64, hbm=memory, tables=where)
    rows = found.largest_rows
    assert found.excess < 0
    assert found.largest_batch == 2 * rows
    fits = planned(cluster, schema=SCHEMA, batch_size=2 * rows, hbm=memory, tables=where)
    assert fits.excess <= 0
    slack = fits.largest_rows - rows  # bytes are rounded up for each shard
    assert 0 <= slack <= rows * 1e-3
    over = 2 * (fits.largest_rows + 1 + rows // 1000)
    try:
        more = planned(cluster, schema=SCHEMA, batch_size=over, hbm=memory, tables=where)
    except NoPlanError:
        return
    assert more.excess > 0


def test_a_batch_that_is_too_large_is_told_with_the_excess_and_the_largest():
    plan = planned(schema=SCHEMA, batch_size=2**21, hbm="2GB", reserve=0.2)
    assert plan.excess > 0
    text = plan_text(plan)
    assert "It does NOT fit: rank" in text
    assert "The most is what the dense part saves" in text
    assert f"The largest batch that fits with these shards: {plan.largest_batch:,} rows" in text
    micro_batches = int(text.rpartition("--train.gradient_accumulation_steps ")[2].split()[0])
    cut = TrainConfig(gradient_accumulation_steps=micro_batches)
    assert planned(schema=SCHEMA, batch_size=2**21, hbm="2GB", reserve=0.2, train=cut).excess <= 0


def test_rows_in_host_memory_are_not_the_devices():
    tables = {"item": TableSharding(kernel="fused_uvm_caching")}
    here, there = planned(), planned(tables=tables)
    host = sum(rank.memory.host for rank in there.ranks)
    assert host == 2_000_000 * (64 + 1) * 4  # a number a row for row-wise Adagrad
    assert sum(rank.memory.host for rank in here.ranks) == 0
    assert sum(r.memory.tables for r in here.ranks) - host < sum(
        r.memory.tables for r in there.ranks
    )
    assert all(rank.memory.caches > 0 for rank in there.ranks if rank.memory.host)
    assert "in host memory, at most" in plan_text(there)


def test_frozen_tables_are_held_without_an_optimizer():
    frozen = replace(SCHEMA, frozen={"kind": FrozenTable(width=12, file="kind.npy")})
    rows = SCHEMA.tables
    plan = planned(schema=frozen, model=replace(MODEL, embedding_dim=8))
    wide = {name: 12 if name == "kind" else 8 for name in TABLES}
    memory = [rank.memory for rank in plan.ranks]
    assert sum(m.tables for m in memory) == 4 * sum(rows[name] * wide[name] for name in TABLES)
    assert sum(m.state for m in memory) == 4 * sum(rows[name] for name in TABLES if name != "kind")


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "adam", "sgd"])
def test_a_tables_optimizer_has_its_state(optimizer):
    plan = planned(train=TrainConfig(table_optimizer=optimizer), schema=SCHEMA, model=MODEL)
    numbers = {"rowwise_adagrad": 1, "adagrad": 4, "adam": 8, "sgd": 0}[optimizer]
    state = 4 * numbers * sum(SCHEMA.tables[name] for name in TABLES)
    assert sum(rank.memory.state for rank in plan.ranks) == state
    # Narrow tables are not cut by columns, so that TorchRec's own estimate is the same.
    for rank, held in zip(plan.ranks, plan.report.rank_bytes, strict=True):
        assert rank.memory.device == held


def test_experts_and_precision_are_in_it():
    plain = planned(model=replace(WIDE, hilomoe=InjectionConfig(enabled=False)))
    experts = planned(model=replace(WIDE, hilomoe=InjectionConfig(num_layers=4, num_experts=16)))
    assert experts.dense.parameters > plain.dense.parameters
    assert experts.step.compute > plain.step.compute
    assert experts.activations.per_row > plain.activations.per_row
    reduced = planned(train=TrainConfig(precision="bf16"))
    assert reduced.step.compute < planned().step.compute


def test_json_has_every_figure():
    plan = planned()
    raw = json.loads(plan.to_json())
    assert raw["fits"] is True
    assert raw["largest_batch"] == plan.largest_batch
    assert raw["needed"][plan.fullest] == plan.needed(plan.fullest) == max(raw["needed"])
    assert raw["step"]["bound"] == plan.step.bound
    assert len(raw["ranks"]) == 8
    assert raw["ranks"][0]["memory"]["tables"] == plan.ranks[0].memory.tables
    assert {table["table"] for table in raw["report"]["tables"]} == set(TABLES)


def test_the_text_says_who_counted_and_who_estimated():
    text = plan_text(planned(inter_host_bandwidth=25))
    assert "8 ranks on 2 hosts, cuda, 80.0 GB a device" in text
    assert "* counted exactly   ~ TorchRec's estimator" in text
    assert re.search(r"lookup and update of rows, slowest rank +[\d.]+ ms  TorchRec's est", text)
    assert re.search(r"dense part's products +[\d.]+ ms  counted FLOPs", text)
    assert "bandwidth between hosts: 25.0 GB/s (given)" in text
    assert "bandwidth within a host: 600.0 GB/s (TorchRec's default)" in text
    assert "histories: full" in text


def test_many_ranks_are_few_lines():
    plan = planned(Cluster(world_size=64, hosts=8), batch_size=2**16)
    assert len(plan_text(plan).splitlines()) < 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(world_size=6, hosts=4), "--world_size 6 cannot be shared by --hosts 4"),
        (lambda: Cluster(world_size=0), "--world_size must be at least 1, got 0"),
        (lambda: Cluster(device_flops=0), "--device_flops must be above 0, got 0"),
        (lambda: Cluster(utilization=2), "--utilization must be above 0 and at most 1, got 2"),
        (lambda: Cluster(headroom=1), "--headroom must be at least 0 and below 1, got 1"),
        (lambda: planned(hbm=None), "sharding.hbm is null, and the GPUs are not here"),
        (lambda: planned(batch_size=7), "train.batch_size = 7 is the global batch, which --world_"),
        (lambda: with_rows(SCHEMA, ["itm=5"]), "--rows itm=5: there is no table 'itm', only item,"),
        (lambda: with_rows(SCHEMA, ["item=many"]), "--rows item=many: write it as item=10000000"),
        (
            lambda: planned(Cluster(device="cpu"), train=TrainConfig(table_optimizer="adam")),
            "train.table_optimizer is 'adam', which cannot be fused on cpu",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.slow
def test_a_thousand_ranks_and_ten_billion_rows_are_planned_within_two_minutes():
    start = time.monotonic()
    schema = with_rows(SCHEMA, ["item=1e10"])
    plan = planned(Cluster(world_size=1024, hosts=128), schema=schema, batch_size=2**19)
    assert time.monotonic() - start < 120
    (item,) = [table for table in plan.report.tables if table.table == "item"]
    assert (item.type, len(item.ranks)) == ("row_wise", 1024)
    assert sum(rank.memory.tables for rank in plan.ranks) > 10**10 * 64 * 4
    assert plan.excess < 0
