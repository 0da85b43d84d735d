"""Small raw logs in the formats of the public sets, written at random, with rare values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from torchrec_hilomoe.data.prepare.criteo import FIELDS, NUMBERS

__all__ = [
    "alimama_rows",
    "criteo_rows",
    "write_criteo",
    "write_csv",
    "write_vectors",
    "x1_rows",
]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with a header; what is None is empty."""
    lines = [",".join(rows[0])]
    lines += [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_vectors(path: Path, keys: Sequence[int], width: int = 8) -> np.ndarray:
    """Write vectors with their keys, as the public sets' ``.h5`` files have them."""
    vectors = np.random.default_rng(5).normal(size=(len(keys), width)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.create_dataset("key", data=list(keys))
        file.create_dataset("value", data=vectors)
    return vectors


def x1_rows(
    count: int,
    columns: Mapping[str, int],
    histories: Mapping[str, int],
    *,
    label: str,
    seed: int = 0,
    longest: int = 12,
    extra: Mapping[str, object] | None = None,
) -> list[dict[str, Any]]:
    """Rows of skewed ids.

    Args:
        count: How many.
        columns: A column to the number of its values.
        histories: A column of ``^``-joined values to their number; all of one length a row.
        label: The column of clicks.
        seed: Of all of it.
        longest: The longest history; the shortest is empty.
        extra: Columns of one value each.
    """
    rng = np.random.default_rng(seed)

    def ids(values: int, size: int) -> list[int]:
        return (rng.zipf(1.4, size=size) % values).tolist()

    rows = []
    for number in range(count):
        length = int(rng.integers(0, longest + 1))
        row: dict[str, Any] = {label: int(rng.random() < 0.4)}
        row |= {name: ids(values, 1)[0] for name, values in columns.items()}
        joined = {name: "^".join(map(str, ids(n, length))) for name, n in histories.items()}
        rows.append({**row, **joined, "timestamp": 1000 + 3 * number, **(extra or {})})
    return rows


def alimama_rows(rows: Sequence[Mapping[str, object]], places: Mapping[str, int]) -> list[str]:
    """The rows of TaobaoAd_x1 in the raw layout of 267 fields, from which that set was made."""
    lines = []
    for row in rows:
        fields = ["0"] * 267
        for start, name in ((0, "btag_his"), (50, "cate_his"), (100, "brand_his")):
            events = [event for event in str(row[name]).split("^") if event]
            # Padded in front, with zeros.
            for place, event in enumerate(events, start=start + 50 - len(events)):
                fields[place] = event
        for name, place in places.items():
            fields[place] = str(row[name])
        lines.append(",".join(fields))
    return lines


def criteo_rows(count: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of Criteo's 13 counts and 26 texts, each of which may be missing."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        numbers = [None if rng.random() < 0.2 else int(rng.integers(-3, 900)) for _ in NUMBERS]
        texts = [None if rng.random() < 0.1 else f"{rng.zipf(1.6) % 50:08x}" for _ in FIELDS]
        row = {"label": int(rng.random() < 0.25)}
        found.append({**row, **dict(zip((*NUMBERS, *FIELDS), (*numbers, *texts), strict=True))})
    return found


def write_criteo(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as the challenge's train.txt has them."""
    lines = ["\t".join("" if v is None else str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")
