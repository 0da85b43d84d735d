"""Prepare with PySpark what ``apps/prepare.py parquet`` prepares: the same ids, rows and splits.

    pip install -r requirements/spark.txt   # and Java 17 or newer
    python examples/prepare_spark.py --raw clicks --schema clicks.yaml --out data/clicks
    python apps/prepare.py check data/clicks

``clicks/train/`` holds Parquet, in Hive's partitions (``dt=2026-01-31/``) or not; its latest rows
are held out. The schema is that of docs/data.md with a time, counted vocabularies, and no frozen
tables. Any file system that Spark knows will do. Nothing here needs PyTorch.
"""

# PySpark is of an extra, which a type checker need not have.
# pyright: reportMissingImports=false

import argparse
import json
import math
from bisect import bisect_right
from functools import reduce
from itertools import accumulate
from operator import and_
from typing import Any

import yaml
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

ROW, GOOD = "__row", "__good"
TEXTS = T.StringType | T.BinaryType | T.DateType
Schema = dict[str, Any]
USUAL = {"version": 2, "label": "label", "group": "user", "weight": None}
EMPTY = {"sequences": [], "pooled": [], "dense": [], "tables": {}, "vocabularies": {}}


def read_schema(path: str) -> tuple[Schema, dict[str, str]]:
    """Return a schema, and the raw column of columns that have another name."""
    with open(path, encoding="utf-8-sig") as source:
        schema = USUAL | EMPTY | yaml.safe_load(source)
    raw = schema.pop("columns", {})
    is_counted = all(rule["kind"] == "counted" for rule in schema["vocabularies"].values())
    if schema.get("frozen") or not is_counted or not schema.get("time"):
        raise SystemExit("error: this example wants a time, counted vocabularies, nothing frozen")
    if schema["group"] in id_tables(schema):  # whose ids put all unknown users into one group
        group = f"{schema['group']}_group"
        raw[group] = raw.get(schema["group"], schema["group"])
        schema["group"] = group
    return schema, raw


def id_tables(schema: Schema) -> dict[str, str]:
    """Return the table of every column of ids."""
    fields = [field for group in schema["sequences"] for field in group["fields"]]
    features = [*schema["candidate"], *fields, *schema["pooled"]]
    return {feature["name"]: feature["table"] for feature in features}


def parallel_lists(schema: Schema) -> list[tuple[list[str], int, str]]:
    """Return list columns of equal lengths, how many entries they keep, and from which end."""
    found = []
    for group in schema["sequences"]:
        times = [group["time"]] if group.get("time") else []
        names = [*(field["name"] for field in group["fields"]), *times]
        found.append((names, group["max_length"], group.get("keep", "last")))
    bags = [([bag["name"]], bag.get("max_length", 1), "last") for bag in schema["pooled"]]
    return [*found, *(bag for bag in bags if bag[1] > 1)]


def typed(stored: DataFrame, schema: Schema, raw: dict[str, str]) -> DataFrame:
    """Return the schema's columns, typed but not encoded, ``ROW``, and whether rows are good."""
    source = {name: raw.get(name, name) for name in stored.columns} | raw
    kinds = {name: stored.schema[column].dataType for name, column in source.items()}
    tables, lists = id_tables(schema), parallel_lists(schema)
    columns: dict[str, Column] = {}
    good: list[Column] = []
    for name in [name for names, _, _ in lists for name in names]:
        is_text = name in tables and isinstance(kinds[name].elementType, TEXTS)
        kind = "array<string>" if is_text else "array<bigint>"
        columns[name] = F.coalesce(F.col(source[name]).cast(kind), F.array().cast(kind))
        good.append(F.forall(columns[name], lambda it: it.isNotNull() & (it.cast("string") != "")))
    for (first, *others), _, _ in lists:
        good += [F.size(columns[name]) == F.size(columns[first]) for name in others]
    for name in [name for name in tables if name not in columns]:
        is_text = isinstance(kinds[name], TEXTS)
        columns[name] = F.col(source[name]).cast("string" if is_text else "bigint")
        if tables[name] not in schema["vocabularies"]:  # ids already
            columns[name] = F.coalesce(columns[name], F.lit(0))
            good.append(columns[name].between(0, schema["tables"][tables[name]] - 1))
    for name in [*schema["dense"], *filter(None, [schema["weight"]])]:
        columns[name] = F.col(source[name]).cast("float")
        good.append(F.abs(columns[name]) < math.inf)
    label, time, group = (F.col(source[schema[name]]) for name in ("label", "time", "group"))
    if isinstance(kinds[schema["group"]], TEXTS):  # any number will do that tells texts apart
        group = F.shiftrightunsigned(F.xxhash64(group), 1)
    good += [label.cast("double").isin(0, 1), time.isNotNull(), group.isNotNull()]
    columns |= {
        schema["label"]: label.cast("tinyint"),
        schema["time"]: time.cast("timestamp").cast("bigint"),
        schema["group"]: group.cast("bigint"),
        ROW: F.monotonically_increasing_id(),
        GOOD: reduce(and_, (F.coalesce(it, F.lit(False)) for it in good)),
    }
    return stored.select(*(column.alias(name) for name, column in columns.items()))


def borders(rows: DataFrame, time: str, valid: int, test: int) -> tuple[int, int]:
    """Return when validation and test begin: as asked, or as near as ties of times allow."""
    # The driver holds each different time once.
    found = rows.groupBy(time).count().orderBy(time).collect()
    times, up_to = [it[0] for it in found], [*accumulate(it[1] for it in found)]

    def after(percent: int) -> int:
        return bisect_right(up_to, math.ceil((up_to[-1] - 1) * (1 - percent / 100)))

    test_at = max(after(test), 2 if valid else 1) if test else len(times)
    valid_at = max(min(after(valid + test), test_at - 1), 1) if valid else test_at
    if max(valid_at if valid else 0, test_at if test else 0) >= len(times):
        raise SystemExit(f"error: {time} has too few different values, {len(times)}")
    times.append(times[-1] + 1)
    return times[valid_at], times[test_at]


def count(rows: DataFrame, columns: list[str], min_count: int) -> DataFrame:
    """Return ``value`` and ``id``, of values that are frequent enough in one of the columns."""
    counts = []
    for name in columns:
        is_list = isinstance(rows.schema[name].dataType, T.ArrayType)
        values = rows.select((F.explode(name) if is_list else F.col(name)).alias("value"))
        found = values.dropna().groupBy("value").count()
        counts.append(found.where(F.col("count") >= min_count))
    total = reduce(DataFrame.union, counts).groupBy("value").agg(F.sum("count").alias("count"))
    place = F.row_number().over(Window.orderBy(F.desc("count"), "value"))
    return total.select("value", place.cast("bigint").alias("id"))


def cut_for_counting(rows: DataFrame, schema: Schema, raw: dict[str, str]) -> DataFrame:
    """Return the rows with what is kept of lists, in any use of their raw column by their table."""
    tables = id_tables(schema)
    ends: dict[tuple[str, str], dict[str, int]] = {}
    use: dict[str, tuple[str, str]] = {}
    for names, most, keep in parallel_lists(schema):
        for name in filter(tables.get, names):  # times are not counted
            use[name] = tables[name], raw.get(name, name)
            kept = ends.setdefault(use[name], {"first": 0, "last": 0})
            kept[keep] = max(kept[keep], most)

    def kept_of(name: str) -> Column:
        first, last = ends[use[name]]["first"], F.size(name) - ends[use[name]]["last"]
        return F.filter(name, lambda _, at: (at < first) | (at >= last))

    return rows.withColumns({name: kept_of(name) for name in use})


def encode(rows: DataFrame, name: str, vocabulary: DataFrame, unknown: int) -> DataFrame:
    """Return ``ROW`` and the ids of its values; those of lists are looked up one a line."""
    is_list = isinstance(rows.schema[name].dataType, T.ArrayType)
    values = rows.select(ROW, F.posexplode_outer(name) if is_list else F.col(name).alias("col"))
    found = values.join(vocabulary, F.col("col") == F.col("value"), "left")
    id_ = F.coalesce("id", F.lit(unknown)).cast("int").alias("id")
    if not is_list:
        return found.select(ROW, id_.alias(name))
    entry = F.when(F.col("pos").isNotNull(), F.struct("pos", id_))  # null for an empty list
    return found.groupBy(ROW).agg(F.sort_array(F.collect_list(entry))["id"].alias(name))


def main() -> None:
    """Hold out by time, count, encode, and write; the mark of a whole folder comes last."""
    parser = argparse.ArgumentParser(description="Prepare Parquet with PySpark.")
    parser.add_argument("--raw", required=True, help="folder with train/")
    parser.add_argument("--schema", required=True, help="YAML or JSON")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--valid_percent", type=int, default=5, help="of rows, before the latest")
    parser.add_argument("--test_percent", type=int, default=5, help="of rows, the latest")
    parser.add_argument("--max_bad_rows", type=int, default=100, help="more are fatal")
    args = parser.parse_args()
    spark = SparkSession.builder.config("spark.sql.session.timeZone", "UTC").getOrCreate()
    path = spark._jvm.org.apache.hadoop.fs.Path
    files = path(args.out).getFileSystem(spark._jsc.hadoopConfiguration())

    schema, raw = read_schema(args.schema)
    rows = typed(spark.read.parquet(f"{args.raw}/train"), schema, raw).cache()
    if (bad := rows.where(~F.col(GOOD)).count()) > args.max_bad_rows:
        raise SystemExit(f"error: {bad} rows are bad, more than max_bad_rows {args.max_bad_rows}")
    rows, time = rows.where(GOOD).drop(GOOD), F.col(schema["time"])
    valid_from, test_from = borders(rows, schema["time"], args.valid_percent, args.test_percent)
    trained = cut_for_counting(rows.where(time < valid_from), schema, raw)
    for names, most, keep in parallel_lists(schema):
        start = F.greatest(F.lit(1), F.size(names[0]) - most + 1) if keep == "last" else F.lit(1)
        rows = rows.withColumns({name: F.slice(name, start, F.lit(most)) for name in names})
    tables = id_tables(schema)
    encoded = rows.drop(*(name for name in tables if tables[name] in schema["vocabularies"]))
    for table, rule in schema["vocabularies"].items():
        columns = [name for name in tables if tables[name] == table]
        counted = {raw.get(name, name): name for name in reversed(columns)}  # a raw column, once
        vocabulary = count(trained, [*counted.values()], rule.get("min_count", 1)).cache()
        known, own = vocabulary.count(), rule.get("unknown") == "last"
        schema["tables"][table] = known + 1 + own
        rule["file"] = f"vocabularies/{table}.parquet"
        for name in columns:
            encoded = encoded.join(encode(rows, name, vocabulary, own * (known + 1)), ROW)
        parts = f"{args.out}/vocabularies/.{table}"
        vocabulary.repartition(1).sortWithinPartitions("id").write.parquet(parts)
        (part,) = files.globStatus(path(f"{parts}/*.parquet"))
        files.rename(part.getPath(), path(f"{args.out}/{rule['file']}"))
        files.delete(path(parts), True)
    rows = encoded.drop(ROW).cache()
    rows.where(time < valid_from).orderBy(F.rand(0)).write.parquet(f"{args.out}/train")
    rows.where(time.between(valid_from, test_from - 1)).write.parquet(f"{args.out}/valid")
    rows.where(time >= test_from).write.parquet(f"{args.out}/test")
    for name, text in (("schema.json", json.dumps(schema, indent=2)), ("_SUCCESS", "")):
        sink = files.create(path(f"{args.out}/{name}"))
        sink.write(bytearray(text.encode()))
        sink.close()


if __name__ == "__main__":
    main()
