"""Rows per second from Parquet to ready batches, against pyarrow reading the same columns.

    python -m benchmarks.bench_data --data DIR --out benchmarks/results/data.jsonl

``DIR`` is a folder that ``apps/prepare.py`` made; without it, rows are generated into a
temporary one. Every row's ids, labels and dense values are summed per column through both paths
before anything is timed; a difference stops the run. Rounds of the contenders alternate, so that
a busy machine slows them alike. One JSON line per contender.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

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


def environment() -> dict[str, object]:
    """What a reader must know before comparing two result files."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or "none",
        "pyarrow": pa.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "arrow_threads": pa.cpu_count(),
    }


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Check, then time, then print and append one line a contender."""
    source = ParquetSource(str(folder), "train")
    rows = check(folder, source)
    size = sum(path.stat().st_size for path in (folder / "train").glob("*.parquet"))
    runs = contenders(folder, source, args.batch_size)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            before = time.perf_counter(), time.process_time()
            seen = run()
            wall[name].append(time.perf_counter() - before[0])
            cpu[name].append(time.process_time() - before[1])
            assert seen == rows
    for name in runs:
        seconds, cpu_seconds = statistics.median(wall[name]), statistics.median(cpu[name])
        line = {
            "dataset": source.schema.dataset,
            "provider": name,
            "batch_size": args.batch_size,
            "rows": rows,
            "file_mb": round(size / 2**20, 1),
            "rows_per_second": round(rows / seconds),
            "of_pyarrow": round(statistics.median(wall["pyarrow"]) / seconds, 3),
            "of_pyarrow_cpu": round(statistics.median(cpu["pyarrow"]) / cpu_seconds, 3),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
            **environment(),
        }
        print(json.dumps(line))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as sink:
                sink.write(json.dumps(line) + "\n")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a prepared folder; default: generated rows")
    parser.add_argument("--rows", type=int, default=400_000, help="rows to generate without --data")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each contender")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    args = parser.parse_args()
    if args.data:
        measure(args.data, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(folder, train_rows=args.rows, eval_rows=4096)
        measure(Path(folder), args)


if __name__ == "__main__":
    main()
