"""examples/prepare_spark.py against ``prepare parquet``: the same ids, rows and splits."""

import datetime
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.processes import ROOT
from tests.integration.test_tools import use
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.data.schema import Schema

pytest.importorskip("pyspark", reason="PySpark is not installed; `make test-spark` installs it")
pytestmark = pytest.mark.slow

SPLITS = ("train", "valid", "test")
SCHEMA = {
    "dataset": "clicks",
    "group": "user_id",
    "time": "at",
    "weight": "weight",
    "candidate": [{"name": "item", "table": "item"}, {"name": "shop", "table": "shop"}],
    "sequences": [
        {
            "name": "history",
            "max_length": 4,
            "time": "seen_at",
            "fields": [{"name": "seen", "table": "item"}, {"name": "seen_shop", "table": "shop"}],
        },
        {
            "name": "first",
            "max_length": 2,
            "keep": "first",
            "fields": [{"name": "first_seen", "table": "shop"}],
        },
    ],
    "pooled": [
        {"name": "user_id", "table": "user"},
        {"name": "hour", "table": "hour"},
        {"name": "tags", "table": "tag", "max_length": 3},
    ],
    "dense": ["price"],
    "tables": {"hour": 24},
    "vocabularies": {
        "item": {"kind": "counted", "min_count": 3},
        "shop": {"kind": "counted", "unknown": "last"},
        "user": {"kind": "counted", "min_count": 2},
        "tag": {"kind": "counted"},
    },
    "columns": {"first_seen": "seen_shop"},
}


def click(rng, moment):
    """A row, whose values grow rarer with their number; some are missing, some wrong."""
    length = rng.randint(0, 7)
    events = [min(int(rng.expovariate(0.15)), 99) for _ in range(length)]
    shops = [event % 11 for event in events]
    return {
        "label": rng.choice([0, 1]) if rng.random() > 0.01 else 3,
        "user_id": rng.randrange(40),
        "at": moment,
        "weight": rng.random(),
        "item": rng.choice(["é", "z", "Z", "a b", f"item {int(rng.expovariate(0.1))}", None]),
        "shop": rng.randrange(15),
        "seen": [f"item {event}" for event in events],
        "seen_shop": shops if rng.random() > 0.01 else [*shops, 1],
        "seen_at": [moment - 60 * (length - place) for place in range(length)],
        "hour": rng.randrange(24) if rng.random() > 0.01 else 24,
        "tags": rng.choice([None, [], rng.sample(range(-3, 9), 5)]),
        "price": rng.choice([1.5, rng.uniform(0, 1e6)]) if rng.random() > 0.01 else None,
    }


def write_days(folder, rng, *, days, rows, tied):
    """Write a folder a day as Hive does; ``tied`` gives a whole day one time."""
    for day in range(days):
        moments = [1_700_000_000 + 86_400 * day + (0 if tied else 7 * n) for n in range(rows)]
        table = pa.Table.from_pylist([click(rng, moment) for moment in moments])
        date = datetime.date(2026, 1, 1) + datetime.timedelta(days=day)
        (folder / "train" / f"dt={date}").mkdir(parents=True)
        pq.write_table(table, folder / "train" / f"dt={date}" / "part-0.parquet")


ONE_CORE = "--master local[1] --conf spark.ui.enabled=false --conf spark.sql.shuffle.partitions=2"


def with_spark(*words):
    """Run the example in a process of its own; Spark's own words are many."""
    command = [sys.executable, ROOT / "examples/prepare_spark.py", *map(str, words)]
    environment = {**os.environ, "PYSPARK_SUBMIT_ARGS": f"{ONE_CORE} pyspark-shell"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def rows_of(folder, split):
    return pq.read_table(folder / split).to_pylist()


def sorted_rows(folder, split):
    """Rows in an order of their own; as text, because some values are lists."""
    rows = [dict(sorted(row.items())) for row in rows_of(folder, split)]
    return sorted(rows, key=repr)


@pytest.mark.parametrize("tied", [False, True], ids=["times", "a time a day"])
def test_spark_writes_what_prepare_parquet_writes(tmp_path, tied):
    write_days(tmp_path / "raw", random.Random(7), days=6, rows=200, tied=tied)
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(SCHEMA))
    ours, theirs = tmp_path / "ours", tmp_path / "spark"
    raw = tmp_path / "raw"
    report = prepare_parquet(raw=str(raw), schema=str(schema), out=str(ours), test_percent=10)
    words = ("--raw", raw, "--schema", schema, "--out", theirs)
    ended = with_spark(*words, "--test_percent", 10)
    assert ended.returncode == 0, ended.stderr[-2000:]
    code, said = use("prepare", "check", str(theirs))
    assert code == 0, said
    found, wanted = (Schema.load(str(folder / "schema.json")) for folder in (theirs, ours))
    assert found.differences(wanted) == ()
    assert sum(report.rows_bad.values()) > 0
    for table in wanted.vocabularies:
        one, other = (
            pq.read_table(folder / "vocabularies" / f"{table}.parquet").to_pylist()
            for folder in (theirs, ours)
        )
        assert one == other
    for split in SPLITS:
        assert sorted_rows(theirs, split) == sorted_rows(ours, split)
        assert len(rows_of(theirs, split)) == report.splits[split].rows > 0
    times = [row["at"] for row in rows_of(theirs, "train")]
    assert times != sorted(times)


def test_spark_counts_bad_rows_and_stops(tmp_path):
    write_days(tmp_path / "raw", random.Random(7), days=2, rows=100, tied=False)
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(SCHEMA))
    words = ("--raw", tmp_path / "raw", "--schema", schema, "--out", tmp_path / "out")
    ended = with_spark(*words, "--max_bad_rows", 0)
    assert ended.returncode == 1
    assert "rows are bad, more than max_bad_rows 0" in ended.stderr
    assert not (tmp_path / "out" / "_SUCCESS").exists()
