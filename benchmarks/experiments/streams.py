"""Streams at the limits that the paper states: few clicks, and a feature that hardly varies.

    python -m benchmarks.experiments.streams rare --out data/composed-rare
    python -m benchmarks.experiments.streams skewed --out data/composed-skewed

Rows of the generated world ``composed``, thinned into a prepared folder. ``rare`` keeps all rows
without a click, and of the others as many as make ``SHARE`` of the stream; ``skewed`` keeps every
row of one hour, which is one of the three features that choose the map, and of the other hours as
many as leave it ``HOUR_SHARE`` of the stream. Train on them by ``--data composed-rare`` and so on
of the evidence.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.parquet import SUCCESS_FILE
from torchrec_hilomoe.data.schema import SCHEMA_FILE
from torchrec_hilomoe.data.synthetic import SyntheticSource

KINDS = ("rare", "skewed")
SHARE = 0.005  # of rows with a click, where the world has .2
HOUR, HOURS, HOUR_SHARE = 7, 24, 0.8
ROWS = {"train": 768_000, "valid": 131_072, "test": 262_144}
ROW_GROUP_ROWS = 8192
MOST_ROWS = 1 << 26  # that are generated to choose from


def keeps(kind: str, table: pa.Table, rng: np.random.Generator) -> np.ndarray:
    """Which rows stay."""
    drawn = rng.random(table.num_rows)
    if kind == "rare":
        clicked = table["label"].to_numpy() == 1
        rate = clicked.mean()
        return ~clicked | (drawn < SHARE / (1 - SHARE) * (1 - rate) / rate)
    others = (1 - HOUR_SHARE) / HOUR_SHARE / (HOURS - 1)
    return (table["hour"].to_numpy() == HOUR) | (drawn < others)


def tables(kind: str, split: str, seed: int) -> Iterator[pa.Table]:
    """Enough thinned rows of a split."""
    left, rng = ROWS[split], np.random.default_rng(seed)
    source = SyntheticSource(world="composed", split=split, rows=MOST_ROWS, seed=seed)
    for block in range(len(source.block_rows)):
        table = source.read(0, block)
        kept = table.filter(pa.array(keeps(kind, table, rng)))[:left]
        left -= kept.num_rows
        yield kept
        if left == 0:
            return
    raise ValueError(f"streams: {left:,} rows of {split} are lacking after {MOST_ROWS:,} were read")


def main() -> None:
    """Write one stream as a prepared folder."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split in ROWS:
        (args.out / split).mkdir(parents=True, exist_ok=False)
        table = pa.concat_tables(tables(args.kind, split, args.seed))
        pq.write_table(
            table,
            args.out / split / "part-00000.parquet",
            row_group_size=ROW_GROUP_ROWS,
            write_page_checksum=True,
        )
        hour = np.bincount(table["hour"].to_numpy(), minlength=HOURS).max() / table.num_rows
        clicks = table["label"].to_numpy().mean()
        print(f"{split}: {table.num_rows:,} rows, {clicks:.4f} clicked, {hour:.2f} of one hour")
    SyntheticSource(world="composed", split="train", rows=1, seed=args.seed).schema.save(
        str(args.out / SCHEMA_FILE)
    )
    (args.out / SUCCESS_FILE).touch()


if __name__ == "__main__":
    main()
