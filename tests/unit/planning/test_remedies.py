"""Why tables do not fit, and what helps: what is said to help does."""

import re
from dataclasses import replace

import pytest

from tests.helpers.datasets import SCHEMA
from tests.helpers.models import MODEL
from torchrec_hilomoe.config import RunConfig, ShardingConfig, TableSharding, TrainConfig
from torchrec_hilomoe.planning.cluster import Cluster
from torchrec_hilomoe.planning.estimate import plan_run, with_rows
from torchrec_hilomoe.planning.remedies import plan_or_explain
from torchrec_hilomoe.planning.run_plan import RunPlan
from torchrec_hilomoe.training.sharding.shortage import NoPlanError

FOUR = Cluster(world_size=4, hosts=2)
LARGE = with_rows(SCHEMA, ["item=1e7"])  # 2.4 GB of floats, on four ranks 0.6 GB each
WIDE = replace(MODEL, embedding_dim=64)


def config(hbm: str = "0.5GB", ddr: str = "16GB", **options) -> RunConfig:
    sharding = ShardingConfig(hbm=hbm, ddr=ddr, **options)
    return RunConfig(model=WIDE, train=TrainConfig(batch_size=4096), sharding=sharding)


def shortage(run: RunConfig, schema=LARGE, cluster=FOUR):
    with pytest.raises(NoPlanError) as caught:
        plan_run(run, schema, cluster)
    return caught.value.shortage


def told(run: RunConfig, schema=LARGE, cluster=FOUR) -> str:
    text = plan_or_explain(run, schema, cluster)
    assert isinstance(text, str)
    return text


def test_the_table_and_what_is_missing_are_right():
    found = shortage(config())
    assert (found.table, found.sharding_type) == ("item", "row_wise")
    assert (found.alone, found.host) == (True, False)
    held = 10_000_000 * (64 + 1) // 4 * 4
    assert held < found.needed < held * 1.05  # and what a batch of ids needs
    assert 0 <= 0.3 * 2**30 - found.available < 2  # a share and a percentage, cut to bytes
    # With as much, and not with less, that table alone would fit.
    enough = found.needed / 0.6
    assert isinstance(plan_or_explain(config(f"{enough * 1.02:.0f}"), LARGE, FOUR), RunPlan)
    assert shortage(config(f"{enough * 0.99:.0f}")).table == "item"


def test_it_is_told_by_how_much_and_what_would_help():
    text = told(config())
    assert re.search(
        r"does NOT fit: table 'item' \(10,000,000 rows of 64\) needs 6\d\d.\d MB of memory on one "
        r"rank even when it is cut row_wise, 3\d\d.\d MB more than the 307.2 MB that a rank has",
        text,
    )
    assert "--world_size 16 --hosts 8" in text
    assert "--model.embedding_dim 16" in text
    assert "fused_uvm_caching" in text.partition("What would not")[0]
    assert "--train.batch_size" in text.partition("What would not")[2]
    (memory,) = re.findall(r"--hbm (\w+)", text)
    assert isinstance(plan_or_explain(config(memory), LARGE, FOUR), RunPlan)


def test_the_users_own_constraint_is_found_to_be_in_the_way():
    whole = {"item": TableSharding(type="table_wise")}
    text = told(config("2GB", tables=whole))
    assert "even when it is cut table_wise" in text
    assert "no constraint on item (--sharding.tables.item)" in text.partition("What would not")[0]
    assert isinstance(plan_or_explain(config("2GB"), LARGE, FOUR), RunPlan)


def test_a_leaner_optimizer_is_tried():
    run = config("1.6GB")
    adam = replace(run, train=replace(run.train, table_optimizer="adam"))
    assert "--train.table_optimizer rowwise_adagrad" in told(adam).partition("What would not")[0]
    assert isinstance(plan_or_explain(run, LARGE, FOUR), RunPlan)


def test_host_memory_is_named_where_it_is_short():
    on_host = {"item": TableSharding(kernel="fused_uvm")}
    found = shortage(config("8GB", "1GB", tables=on_host))
    assert (found.table, found.host) == ("item", True)
    text = told(config("8GB", "1GB", tables=on_host))
    assert "of host memory on one rank" in text
    (memory,) = re.findall(r"--ddr (\w+)", text)
    run = config("8GB", memory, tables=on_host)
    assert isinstance(plan_or_explain(run, LARGE, FOUR), RunPlan)


def test_tables_that_do_not_fit_together_are_added_up():
    tables = {name: TableSharding(type="table_wise") for name in ("user", "place", "tag")}
    many = with_rows(SCHEMA, ["user=1e6", "place=1e6", "tag=1e6"])
    run = config("0.5GB", tables=tables)
    found = shortage(run, many, Cluster(world_size=2))
    assert not found.alone
    assert found.needed > 3_000_000 * 65 * 4 > found.available
    text = told(run, many, Cluster(world_size=2))
    assert re.search(r"the tables need 7\d\d.\d MB of memory together, 1\d\d.\d MB more than", text)
    (memory,) = re.findall(r"--hbm (\w+)", text)
    assert isinstance(plan_or_explain(config(memory, tables=tables), many, FOUR), RunPlan)
