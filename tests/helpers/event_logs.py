"""Raw logs of events of any size, in the formats of the sets whose rows need their user's past."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.prepare.registry import DATASETS

__all__ = ["EVENT_LOGS", "EventLogCase"]


@dataclass(frozen=True, kw_only=True)
class EventLogCase:
    """A data set.

    Attributes:
        write: Writes raw files of about so many events into a folder.
        options: Of preparing them.
    """

    write: Callable[[Path, int], None]
    options: Mapping[str, Any]

    def prepare(self, name: str, raw: Path, out: Path, **options: Any) -> Any:
        """Prepare the raw files."""
        return DATASETS[name](raw=str(raw), out=str(out), **self.options, **options)


def _write_movielens(folder: Path, events: int) -> None:
    rng = np.random.default_rng(events)
    users, movies = max(2, events // 80), 400
    user = rng.integers(1, users, size=events)
    # Few moments, so that many of a user's ratings are simultaneous; and repeated ones.
    columns = [user, rng.zipf(1.3, size=events) % movies, rng.integers(1, 6, size=events)]
    columns.append(rng.integers(0, 500, size=events))
    _write_lines(folder / "ratings.dat", "%d::%d::%d::%d", columns)
    genres = ["Drama", "War", "Comedy", "Action|War", "Drama|War"]
    (folder / "movies.dat").write_text(
        "".join(f"{movie}::Title::{genres[movie % 5]}\n" for movie in range(1, movies))
    )
    people = np.arange(1, users)
    _write_lines(
        folder / "users.dat", "%d::F::%d::%d::%05d", [people, people % 7, people % 20, people % 900]
    )


def _write_amazon(folder: Path, events: int) -> None:
    rng = np.random.default_rng(events)
    users, items = max(2, events // 8), 300
    with (folder / "Toy.txt").open("w") as sink:
        for user in rng.permutation(users).tolist():
            bought = rng.zipf(1.2, size=rng.integers(1, 16)) % items
            sink.write(f"{user} {' '.join(map(str, bought.tolist()))}\n")
    attributes = ",".join(f'"{item}": [{item % 3}, {5 + item % 17}]' for item in range(1, items))
    (folder / "Toy_item2attributes.json").write_text(f"{{{attributes}}}")


def _write_trivago(folder: Path, events: int) -> None:
    rng = np.random.default_rng(events)
    kinds = ["interaction item image", "search for item", "filter selection", "clickout item"]
    writer = None
    for start in range(0, events, 20_000):
        count = min(20_000, events - start)
        kind = rng.integers(4, size=count)
        hotels = [rng.integers(400, size=size).tolist() for size in rng.integers(1, 6, size=count)]
        both = list(zip((kind == 3).tolist(), hotels, strict=True))
        shown = ["|".join(map(str, those)) if request else None for request, those in both]
        prices = ["|".join(["7"] * len(those)) if request else None for request, those in both]
        table = pa.table(
            {
                "user_id": [f"U{u}" for u in rng.integers(max(2, events // 40), size=count)],
                "timestamp": 1_541_000_000 + rng.integers(0, 5000, size=count),
                "step": rng.integers(1, 9, size=count),
                "action_type": [kinds[k] for k in kind],
                "reference": np.where(kind == 2, "Wifi", [str(those[0]) for those in hotels]),
                "platform": [("FR", "DE")[p] for p in rng.integers(2, size=count)],
                "city": [("Paris", "Rome", None)[c] for c in rng.integers(3, size=count)],
                "device": ["mobile"] * count,
                "current_filters": [(None, "Wifi", "Wifi|Pool")[f] for f in kind % 3],
                "impressions": pa.array(shown, pa.string()),
                "prices": pa.array(prices, pa.string()),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "sessions.parquet", table.schema)
        writer.write_table(table, row_group_size=5000)
    assert writer is not None
    writer.close()


def _write_lines(path: Path, pattern: str, columns: list[np.ndarray]) -> None:
    with path.open("w") as sink:
        for row in zip(*(column.tolist() for column in columns), strict=True):
            sink.write(pattern % row + "\n")


EVENT_LOGS = {
    "movielens": EventLogCase(
        write=_write_movielens, options={"max_history": 6, "max_liked": 4, "seed": 3}
    ),
    "amazon-sequences": EventLogCase(
        write=_write_amazon, options={"name": "Toy", "max_history": 6, "seed": 3}
    ),
    "trivago": EventLogCase(write=_write_trivago, options={"max_history": 6, "seed": 3}),
}
