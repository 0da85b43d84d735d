"""A shop's Parquet with every kind of column and vocabulary, and its description."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.helpers.raw_logs import write_vectors
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet

ROWS = 300
DESCRIPTION: dict[str, Any] = {
    "dataset": "shop",
    "tables": {"user": 50, "age": 8},
    "candidate": [{"name": "item", "table": "item"}, {"name": "cover", "table": "cover"}],
    "sequences": [
        {
            "name": "clicks",
            "fields": [
                {"name": "clicked", "table": "item"},
                {"name": "clicked_cover", "table": "cover"},
            ],
            "max_length": 4,
            "time": "clicked_at",
        }
    ],
    "pooled": [
        {"name": "user", "table": "user"},
        {"name": "age", "table": "age"},
        {"name": "tags", "table": "tag", "max_length": 3},
    ],
    "dense": ["price"],
    "label": "label",
    "group": "user",
    "time": "at",
    "weight": "weight",
    "frozen": {"cover": {"width": 8, "file": "covers.h5"}},
    "vocabularies": {
        "item": {"kind": "counted", "min_count": 4},
        "user": {"kind": "hashed"},
        "tag": {"kind": "given", "file": "tags.txt", "unknown": "last"},
        "cover": {"kind": "given", "unknown": "last"},
    },
    "columns": {"cover": "item_number", "clicked_cover": "clicked_numbers"},
}
TAGS = ["red", "green", "blue"]


def table(rows: int = ROWS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    numbers = (rng.zipf(1.5, size=rows) % 40).tolist()
    clicked = [(rng.zipf(1.5, size=n) % 40).tolist() for n in rng.integers(0, 7, size=rows)]
    at = (10_000 + rng.permutation(rows)).tolist()
    return pa.table(
        {
            "item": pa.array([f"i{n}" for n in numbers]).dictionary_encode(),
            "item_number": pa.array(numbers, pa.int32()),
            "clicked": [[f"i{n}" for n in ids] for ids in clicked],
            "clicked_numbers": pa.array(clicked, pa.list_(pa.int16())),
            "clicked_at": [
                [t - 5 + k for k in range(len(ids))] for t, ids in zip(at, clicked, strict=True)
            ],
            "user": [f"u{n}" for n in rng.integers(0, 9, size=rows)],
            "age": pa.array(rng.integers(0, 8, size=rows), pa.int8()),
            "tags": [
                "^".join(rng.choice([*TAGS, "odd"], size=n)) for n in rng.integers(0, 5, rows)
            ],
            "price": rng.normal(size=rows),
            "label": pa.array(rng.random(rows) < 0.3),
            "at": at,
            "weight": rng.random(rows),
        }
    )


def write_raw(folder: Path) -> Path:
    """Three files of rows, a description, a vocabulary and vectors."""
    (folder / "train").mkdir(parents=True)
    whole = table()
    for part in range(3):
        pq.write_table(whole.slice(part * 100, 100), folder / "train" / f"{part}.parquet")
    (folder / "tags.txt").write_text("\n".join(TAGS) + "\n")
    write_vectors(folder / "covers.h5", range(40))
    (folder / "schema.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    return folder


def prepare(raw, out, **options):
    settings = {"raw": str(raw), "schema": str(raw / "schema.yaml"), **options}
    return prepare_parquet(out=str(out), **settings)


def read(out, split):
    return pq.read_table(out / split).to_pylist()
