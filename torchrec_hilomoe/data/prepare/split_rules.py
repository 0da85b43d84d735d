"""Which split a raw row belongs to, and where among the training rows it waits.

Both follow from the row's place in the files, so they are the same for any number of threads.

Shape legend:
    N  good rows of a piece
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.first_pass import Counted
from torchrec_hilomoe.data.prepare.parsing import Parsed
from torchrec_hilomoe.data.prepare.plan import HoldOut, Inputs
from torchrec_hilomoe.data.prepare.shards import shard_rows
from torchrec_hilomoe.data.schema import Schema

__all__ = ["Rule", "waiting_shard"]

OPEN_SHARDS = 256  # rows of a longer log are mixed within parts of it that have so many
SHARE = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Where rows go.

    Attributes:
        hold_out: Which training rows are not trained on.
        seed: Of random choices.
        starts: Rows before each file.
        files_of: Split of each file: an index into ``shards.SPLITS``.
        rows: Of all training files.
        borders: The moments, or the places, at which validation and test rows begin.
        shards: Of the training rows.
        rows_per_file: About how many rows a Parquet file gets.
        options: For the report.
        notes: For the report.
    """

    hold_out: HoldOut
    seed: int
    starts: tuple[int, ...]
    files_of: tuple[int, ...]
    rows: int
    borders: tuple[int, int]
    shards: int
    rows_per_file: int
    options: dict[str, Any]
    notes: dict[str, int]

    @classmethod
    def of(
        cls, inputs: Inputs, counted: Counted, schema: Schema, hold_out: HoldOut, seed: int
    ) -> "Rule":
        """Make the rule of some files that are counted."""
        hold_out = HoldOut(
            valid_percent=0 if inputs.valid else hold_out.valid_percent,
            test_percent=0 if inputs.test else hold_out.test_percent,
            by=hold_out.by,
        )
        files = (*inputs.train, *inputs.valid, *inputs.test)
        counts = [counted.rows.get(file.path, 0) for file in files]
        rows = sum(counts[: len(inputs.train)])
        test, held = hold_out.test_percent, hold_out.test_percent + hold_out.valid_percent
        borders, notes = (0, 0), {}
        if hold_out.by == "tail":
            borders = (rows - rows * held // 100, rows - rows * test // 100)
        elif hold_out.by == "time" and held:
            borders = (counted.border(held), counted.border(test))
            notes = {"validation_begins_at": borders[0]}
            if test:
                notes["test_begins_at"] = borders[1]
        every = max(sum(counts), 1)
        rows_per_file = shard_rows(4 * counted.entries / every + 8 * len(schema.columns))
        trained = rows * (100 - held) // 100
        return cls(
            hold_out=hold_out,
            seed=seed,
            starts=tuple(np.cumsum([0, *counts])[:-1].tolist()),
            files_of=(0,) * len(inputs.train) + (1,) * len(inputs.valid) + (2,) * len(inputs.test),
            rows=rows,
            borders=borders,
            shards=max(1, -(-trained // rows_per_file)),
            rows_per_file=rows_per_file,
            options={
                "valid_percent": hold_out.valid_percent,
                "test_percent": hold_out.test_percent,
                "held_out_by": hold_out.by if held else None,
            },
            notes=notes,
        )

    def split(self, file: int, first: int, parsed: Parsed, schema: Schema) -> np.ndarray:
        """Return the split of each good row, an index into ``SPLITS``: ``(N,)``."""
        if self.files_of[file] or not (self.hold_out.valid_percent or self.hold_out.test_percent):
            return np.full(len(parsed.good_N), self.files_of[file])
        test = self.hold_out.test_percent
        if self.hold_out.by == "time":
            assert schema.time is not None
            at_N = parsed.plain[schema.time][parsed.good_N]
            after_test_N = at_N >= self.borders[1] if test else np.zeros(len(at_N), dtype=bool)
            return (at_N >= self.borders[0]).astype(np.int64) + after_test_N
        if self.hold_out.by == "tail":
            at_N = self.starts[file] + first + parsed.good_N
            return (at_N >= self.borders[0]).astype(np.int64) + (at_N >= self.borders[1])
        if self.hold_out.by == "group":
            drawn_N = self._draw(parsed.plain[schema.group][parsed.good_N], "split")
        else:
            drawn_N = self._draw(self.starts[file] + first + parsed.good_N, "split")
        held = test + self.hold_out.valid_percent
        share_N = drawn_N % SHARE
        is_held_N = share_N < SHARE * held // 100
        return is_held_N.astype(np.int64) + (share_N < SHARE * test // 100)

    def shard(self, file: int, first: int, parsed: Parsed) -> np.ndarray:
        """Return where each good row waits, if it trains: ``(N,)``."""
        at_N = self.starts[file] + first + parsed.good_N
        return waiting_shard(at_N, rows=self.rows, shards=self.shards, seed=self.seed)

    def _draw(self, keys_N: np.ndarray, use: str) -> np.ndarray:
        return _draw(keys_N, use, self.seed)


def waiting_shard(at_N: np.ndarray, *, rows: int, shards: int, seed: int) -> np.ndarray:
    """Return the shard in which each row waits, if it trains: ``(N,)``.

    Args:
        at_N: Its place among all rows.
        rows: How many those are.
        shards: Among how many it is drawn; of a long log, among those of its part.
        seed: Of the draw.
    """
    parts = -(-shards // OPEN_SHARDS)
    each = -(-shards // parts)
    part_N = at_N * parts // max(rows, 1)
    return part_N * each + _draw(at_N, "order", seed) % each


def _draw(keys_N: np.ndarray, use: str, seed: int) -> np.ndarray:
    """Return a random number of each key: other seeds and uses, other numbers."""
    salt = mix64(np.array([2 * seed + (use == "order")], dtype=np.uint64))
    return (mix64(keys_N.astype(np.uint64) ^ salt) >> np.uint64(1)).astype(np.int64)
