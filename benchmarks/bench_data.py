"""Rows per second from Parquet to ready batches, against pyarrow reading the same columns.

    python -m benchmarks.bench_data --data DIR --out benchmarks/results/data.jsonl
    python -m benchmarks.bench_data --cases memory --out benchmarks/results/data.jsonl

``DIR`` is a folder that ``apps/prepare.py`` made; without it, rows are generated into a
temporary one. Every row's ids, labels and dense values are summed per column through both paths
before anything is timed; a difference stops the run. One JSON line per contender. The cases:
``rate`` against pyarrow, ``peers`` against other loaders, ``memory`` over the size of the files,
``padding`` with and without sorting by length, ``prepare`` of raw files in the form of
AmazonElectronics_x1 (``--against TREE``: beside another checkout of the package, in pairs).
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data_peers import fuxictr_loader, iterate, padded_columns, torch_loader
from benchmarks.harness import append, environment, measure, read_lines
from benchmarks.rounding import of_sums
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.data.synthetic import write_synthetic
from torchrec_hilomoe.runtime.process import peak_resident_bytes

PEER_ROWS = 16_384  # the others are slow, or hold everything in memory


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
            got[schema.group] += float(batch.grouping_keys.sum())
    # Numbers of a row are small; those that are large, ids and groups, are all of one sign.
    unit = of_sums(rows) * np.finfo(np.float64).eps
    allowed = {name: unit * max(abs(value), rows) for name, value in want.items()}
    wrong = {n: (want[n], got[n]) for n in want if not abs(want[n] - got[n]) <= allowed[n]}
    if wrong:
        raise SystemExit(f"the loader's columns are not the file's (file, loader): {wrong}")
    return rows


def contenders(
    folder: Path, source: ParquetSource, batch_size: int
) -> dict[str, Callable[[], int]]:
    """Each reads the training split once and returns how many rows it saw."""
    columns = list(source.schema.columns)

    def load(workers: int, prefetch: int) -> Callable[[], int]:
        loader = Loader(source, batch_size=batch_size, epochs=1, workers=workers, prefetch=prefetch)
        return lambda: sum(len(batch.labels) for batch in loader)

    return {
        "pyarrow": lambda: sum(table.num_rows for table in tables(folder, columns)),
        "loader, no thread": load(workers=0, prefetch=0),
        "loader, no worker": load(workers=0, prefetch=4),
        "loader, 1 worker": load(workers=1, prefetch=4),
        "loader, 2 workers": load(workers=2, prefetch=4),
    }


def bench(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Check, then time, and return one line a contender."""
    source = ParquetSource(str(folder), "train")
    rows = check(folder, source)
    results = measure(contenders(folder, source, args.batch_size), args.seconds, "cpu")
    return [
        {
            "case": "rate",
            "dataset": source.schema.dataset,
            "provider": name,
            "batch_size": args.batch_size,
            "rows": rows,
            "file_mb": round(size_of(folder) / 2**20, 1),
            "rows_per_second": round(rows / result.median_us * 1e6),
            "of_pyarrow": round(1 / result.ratio, 3),
            "ratio_iqr": round(result.ratio_iqr, 3),
            "conclusive": result.conclusive,
            **stamp(),
        }
        for name, result in results.items()
    ]


def bench_peers(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Time other loaders over the first block's rows, which they hold in memory, padded."""
    source = ParquetSource(str(folder), "train")
    table = source.read(0, 0).slice(0, PEER_ROWS)
    columns = padded_columns(table, source.schema)
    schema, batch_size = source.schema, args.batch_size
    others: dict[str, Callable[[], int]] = {}
    for workers in (0, 2):
        fuxictr = fuxictr_loader(columns, schema.label, batch_size, workers)
        if fuxictr is not None:
            others[f"FuxiCTR's, {workers} workers"] = iterate(fuxictr, columns)
        torchs = torch_loader(columns, batch_size, workers)
        others[f"torch's DataLoader, {workers} workers"] = iterate(torchs, columns)
    with tempfile.TemporaryDirectory() as scratch:
        ours = Path(scratch)
        (ours / "train").mkdir()
        pq.write_table(table, ours / "train" / "part-00000.parquet", row_group_size=8192)
        for name in ("schema.json", "_SUCCESS"):
            shutil.copy(folder / name, ours / name)
        part = ParquetSource(str(ours), "train")
        check(ours, part)

        def load() -> int:
            loader = Loader(part, batch_size=batch_size, epochs=1, workers=2)
            return sum(len(batch.labels) for batch in loader)

        results = measure({"loader, 2 workers": load, **others}, args.seconds, "cpu")
    return [
        {
            "case": "peers",
            "dataset": schema.dataset,
            "provider": name,
            "batch_size": batch_size,
            "rows": table.num_rows,
            "rows_per_second": round(table.num_rows / result.median_us * 1e6),
            "times_as_long": round(result.ratio, 2),
            "ratio_iqr": round(result.ratio_iqr, 3),
            "conclusive": result.conclusive,
            **stamp(),
        }
        for name, result in results.items()
    ]


def bench_memory(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Read ever larger folders, each in a fresh process, whose peak memory is noted.

    A larger folder has the same files many times over, by links: nothing of a file is kept from one
    to the next, and the page cache is not the process's.
    """
    lines = []
    files = sorted((folder / "train").glob("*.parquet"))
    for megabytes in args.memory:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            large = Path(scratch)
            (large / "train").mkdir()
            for name in ("schema.json", "_SUCCESS"):
                shutil.copy(folder / name, large / name)
            linked = 0
            for number in itertools.count():
                file = files[number % len(files)]
                os.link(file, large / "train" / f"part-{number:05d}.parquet")
                linked += file.stat().st_size
                if linked >= megabytes * 2**20:
                    break
            for workers in (0, 2):
                command = [sys.executable, "-m", "benchmarks.bench_data", "--peak_of", str(large)]
                command += ["--workers", str(workers), "--batch_size", str(args.batch_size)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = json.loads(out.splitlines()[-1])
                about = {"case": "memory", "dataset": source_name(folder), "workers": workers}
                size = {"file_mb": round(linked / 2**20), "batch_size": args.batch_size}
                lines.append({**about, **size, **found, **stamp()})
    return lines


def peak_of(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Read one epoch in this process, and tell its peak memory with and without the imports'."""
    source = ParquetSource(str(folder), "train")
    before = peak_resident_bytes()
    loader = Loader(source, batch_size=args.batch_size, epochs=1, workers=args.workers)
    rows = sum(len(batch.labels) for batch in loader)
    peak = peak_resident_bytes()
    return {"rows": rows, "peak_mb": peak >> 20, "reading_mb": (peak - before) >> 20}


def bench_padding(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Count what sorting by length saves of padded events; no time is taken."""
    source = ParquetSource(str(folder), "train")
    fields = [group.fields[0].name for group in source.schema.sequences]
    lines = []
    for window in (0, 4, 16, 64):
        real = padded = 0
        loader = Loader(source, batch_size=args.batch_size, epochs=1, bucket_by_length=window)
        for batch in loader:
            real += sum(int(batch.unpooled[name].lengths().sum()) for name in fields)
            padded += batch.max_seqlen * len(batch.labels) * len(fields)
        about = {"case": "padding", "dataset": source.schema.dataset, "bucket_by_length": window}
        share = {"padded_per_event": round(padded / real, 3), "batch_size": args.batch_size}
        lines.append({**about, **share, **stamp()})
    return lines


def bench_prepare(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Prepare generated raw files in fresh processes; all trees must write the same."""
    trees = {"this": os.getcwd()} | ({"against": str(args.against)} if args.against else {})
    found: dict[str, list[dict]] = {name: [] for name in trees}
    sums: set[str] = set()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        raw = Path(scratch)
        write_raw(raw / "train.csv", args.rows)
        write_raw(raw / "test.csv", args.rows // 8)
        megabytes = sum(path.stat().st_size for path in raw.iterdir()) >> 20
        code = Path(__file__).with_name("prepare_once.py").read_text()
        for _, (name, tree) in itertools.product(range(args.rounds), trees.items()):
            command = [sys.executable, "-c", code, str(raw), str(raw / "out")]
            env = {**os.environ, "PYTHONPATH": tree}
            out = subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=tree, env=env
            ).stdout
            line = json.loads(out.splitlines()[-1])
            sums.add(line.pop("sum"))
            found[name].append(line)
    if len(sums) > 1:
        raise SystemExit("runs have written different folders")
    lines = []
    for name, runs in found.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        about = {"case": "prepare", "tree": name, "rows": args.rows, "raw_mb": megabytes}
        lines.append({**about, **medians, "rounds": len(runs), **stamp()})
    return lines


def write_raw(path: Path, rows: int) -> None:
    """Write skewed ids and histories of nine events on average."""
    rng = np.random.default_rng(rows)
    with path.open("w") as sink:
        sink.write("label,user_id,item_id,cate_id,item_history,cate_history\n")
        for _ in range(rows):
            events = rng.zipf(1.2, size=min(int(rng.geometric(1 / 9)), 100)) % 63_001
            joined = ("^".join(map(str, ids.tolist())) for ids in (events, events % 801))
            item = int(rng.zipf(1.2)) % 63_001
            label, user = int(rng.integers(2)), int(rng.integers(190_000))
            sink.write(f"{label},{user},{item},{item % 801},{','.join(joined)}\n")


def size_of(folder: Path) -> int:
    """Bytes of the training split's files."""
    return sum(path.stat().st_size for path in (folder / "train").glob("*.parquet"))


def source_name(folder: Path) -> str:
    """The data set's name."""
    return ParquetSource(str(folder), "train").schema.dataset


def stamp() -> dict[str, str | int]:
    """What a reader must know before comparing."""
    return {"pyarrow": pa.__version__, "arrow_threads": pa.cpu_count(), **environment("cpu")}


def plot(lines: list[dict], path: Path) -> None:
    """Draw rates beside pyarrow's, and memory over the file's size."""
    from matplotlib import pyplot as plt  # an extra

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    rates = [line for line in lines if line["case"] == "rate" and line["provider"] != "pyarrow"]
    names = [f"{line['dataset']}\n{line['provider']}" for line in rates]
    left.barh(names, [line["of_pyarrow"] for line in rates])
    left.axvline(0.4, color="grey", linestyle=":")
    left.set_xlabel("rows per second, of pyarrow's")
    left.tick_params(axis="y", labelsize=6)
    memory = [line for line in lines if line["case"] == "memory"]
    for name, workers in sorted({(line["dataset"], line["workers"]) for line in memory}):
        mine = [line for line in memory if (line["dataset"], line["workers"]) == (name, workers)]
        sizes = [line["file_mb"] for line in mine]
        label = f"{name}, {workers} workers"
        right.plot(sizes, [line["peak_mb"] for line in mine], marker="o", label=label)
    right.set(
        xlabel="size of the files, MB", ylabel="peak memory of the process, MB", ylim=(0, None)
    )
    if memory:
        right.legend(fontsize=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a prepared folder; default: generated rows")
    parser.add_argument("--rows", type=int, default=400_000, help="rows to generate without --data")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=30.0, help="time spent, at least 5 rounds")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["rate", "peers", "padding"])
    parser.add_argument("--memory", nargs="+", type=int, default=[100, 400, 1600], metavar="MB")
    parser.add_argument("--against", type=Path, help="another checkout, for the case prepare")
    parser.add_argument("--rounds", type=int, default=5, help="of the case prepare")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--plot", type=Path, help="draw what --out holds")
    parser.add_argument("--peak_of", type=Path, help=argparse.SUPPRESS)  # in the fresh process
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak_of(args.peak_of, args)))
        return
    with tempfile.TemporaryDirectory() as generated:
        folder = args.data
        if folder is None:
            folder = Path(generated) / "rows"
            write_synthetic(str(folder), train_rows=args.rows, eval_rows=4096)
        for case in args.cases:
            lines = CASES[case](folder, args)
            for line in lines:
                print(json.dumps(line))
            if args.out:
                append(args.out, lines)
    if args.plot and args.out:
        plot(read_lines(args.out), args.plot)


CASES = {
    "rate": bench,
    "peers": bench_peers,
    "memory": bench_memory,
    "padding": bench_padding,
    "prepare": bench_prepare,
}

if __name__ == "__main__":
    main()
