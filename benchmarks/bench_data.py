"""Rows per second from Parquet to ready batches, against pyarrow reading the same columns.

    python -m benchmarks.bench_data --data DIR --out benchmarks/results/data.jsonl

``DIR`` is a folder that ``apps/prepare.py`` made; without it, rows are generated into a
temporary one. Every row's ids, labels and dense values are summed per column through both paths
before anything is timed; a difference stops the run. One JSON line per contender.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import append, environment, measure
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.synthetic import write_synthetic


def tables(folder: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Yield every row group, as pyarrow reads it by itself."""
    for path in sorted((folder / "train").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)


def check(folder: Path, source: ParquetSource) -> int:
    """Compare the sums of every column of both paths; return the number of rows.

    Raises:
        SystemExit: If a column differs.
    """
    schema = source.schema
    limits = {feature.name: feature.max_length for feature in schema.pooled}
    for group in schema.sequences:
        limits |= {field.name: group.max_length for field in group.fields}
    want: dict[str, float] = dict.fromkeys(schema.columns, 0.0)
    rows = 0
    for table in tables(folder, list(schema.columns)):
        rows += table.num_rows
        for name in schema.columns:
            array = table.column(name).combine_chunks()
            if pa.types.is_list(array.type):
                assert np.diff(array.offsets.to_numpy()).max(initial=0) <= limits[name]
                array = array.flatten()
            want[name] += float(array.to_numpy().astype(np.float64).sum())
    got = dict.fromkeys(want, 0.0)
    for batch in Loader(source, batch_size=4096, epochs=1, max_bad_rows=0):
        for jagged in (batch.pooled, batch.unpooled):
            for key, values in jagged.to_dict().items():
                got[key] += float(values.values().sum())
        for index, name in enumerate(schema.dense):
            got[name] += float(batch.dense[:, index].double().sum())
        got[schema.label] += float(batch.labels.sum())
        if schema.group not in schema.pooled_keys:
            got[schema.group] += float(batch.groups.sum())
    wrong = {n: (want[n], got[n]) for n in want if not np.isclose(want[n], got[n], rtol=1e-9)}
    if wrong:
        raise SystemExit(f"the loader's columns are not the file's (file, loader): {wrong}")
    return rows


def contenders(
    folder: Path, source: ParquetSource, batch_size: int
) -> dict[str, Callable[[], int]]:
    """Each reads the training split once and returns how many rows it saw."""

    def load(prefetch: int) -> int:
        loader = Loader(source, batch_size=batch_size, epochs=1, prefetch=prefetch)
        return sum(len(batch.labels) for batch in loader)

    columns = list(source.schema.columns)
    return {
        "pyarrow": lambda: sum(table.num_rows for table in tables(folder, columns)),
        "loader": lambda: load(prefetch=0),
        "loader_prefetch_4": lambda: load(prefetch=4),
    }


def bench(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Check, then time, and return one line a contender."""
    source = ParquetSource(str(folder), "train")
    rows = check(folder, source)
    results = measure(contenders(folder, source, args.batch_size), args.seconds, "cpu")
    size = sum(path.stat().st_size for path in (folder / "train").glob("*.parquet"))
    return [
        {
            "dataset": source.schema.dataset,
            "provider": name,
            "batch_size": args.batch_size,
            "rows": rows,
            "file_mb": round(size / 2**20, 1),
            "rows_per_second": round(rows / result.median_us * 1e6),
            "of_pyarrow": round(1 / result.ratio, 3),
            "ratio_iqr": round(result.ratio_iqr, 3),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
            "pyarrow": pa.__version__,
            "arrow_threads": pa.cpu_count(),
            **environment("cpu"),
        }
        for name, result in results.items()
    ]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a prepared folder; default: generated rows")
    parser.add_argument("--rows", type=int, default=400_000, help="rows to generate without --data")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=30.0, help="time spent, at least 5 rounds")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.data:
        lines = bench(args.data, args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_synthetic(folder, train_rows=args.rows, eval_rows=4096)
            lines = bench(Path(folder), args)
    for line in lines:
        print(json.dumps(line))
    if args.out:
        append(args.out, lines)


if __name__ == "__main__":
    main()
