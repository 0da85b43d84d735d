"""Which split a raw row belongs to, and where among the training rows it waits.

Both follow from the row's place in the files, so they are the same for any number of threads. They
are known before values are counted: rows that are held out decide nothing.

Shape legend:
    N  good rows of a batch
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.column_mapping import HoldOut
from torchrec_hilomoe.data.prepare.order_statistics import OrderStatistics
from torchrec_hilomoe.data.schema import Schema

__all__ = ["SplitRule", "check_splits", "find_rule", "time_borders", "waiting_shard"]

OPEN_SHARDS = 256  # rows of a longer log are mixed within parts of it that have so many
SHARE = 1 << 32


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Where rows go.

    Attributes:
        hold_out: Which training rows are not trained on.
        seed: Of random choices.
        borders: The moments, or the places, at which validation and test rows begin.
        column: What a row is told by, beside its place; null if by nothing.
    """

    hold_out: HoldOut
    seed: int
    borders: tuple[int, int] = (0, 0)
    column: str | None = None

    def split(self, at_N: np.ndarray, rows: pl.DataFrame) -> np.ndarray:
        """Return the split of training files' good rows, an index into ``SPLITS``: ``(N,)``.

        Args:
            at_N: Their place among all rows of training files.
            rows: With :attr:`column`.
        """
        valid, test = self.hold_out.valid_percent, self.hold_out.test_percent
        if not valid + test:
            return np.zeros(len(at_N), dtype=np.int64)
        told_N = at_N if self.column is None else rows[self.column].to_numpy()
        if self.hold_out.by in ("time", "tail"):
            after_test_N = told_N >= self.borders[1] if test else np.zeros(len(at_N), dtype=bool)
            return (told_N >= self.borders[0]).astype(np.int64) + after_test_N
        share_N = _draw(told_N, "split", self.seed) % SHARE
        is_held_N = share_N < SHARE * (test + valid) // 100
        return is_held_N.astype(np.int64) + (share_N < SHARE * test // 100)

    @property
    def options(self) -> Mapping[str, int | str | None]:
        """For the report."""
        hold_out = self.hold_out
        held = hold_out.valid_percent + hold_out.test_percent
        return {
            "valid_percent": hold_out.valid_percent,
            "test_percent": hold_out.test_percent,
            "held_out_by": hold_out.by if held else None,
        }

    @property
    def notes(self) -> Mapping[str, int]:
        """For the report."""
        hold_out = self.hold_out
        if hold_out.by != "time" or not hold_out.valid_percent + hold_out.test_percent:
            return {}
        tested = {"test_begins_at": self.borders[1]} if hold_out.test_percent else {}
        return {"validation_begins_at": self.borders[0], **tested}


def find_rule(
    hold_out: HoldOut, schema: Schema, seed: int, *, rows: int, times: OrderStatistics
) -> SplitRule:
    """Find where rows of training files go.

    Args:
        hold_out: What is asked for, and no file of its own has.
        schema: What the rows are.
        seed: Of random choices.
        rows: How many rows training files have.
        times: Of good ones, if the schema has a time.

    Raises:
        DataError: If there are too few different times.
    """
    rule = SplitRule(hold_out=hold_out, seed=seed)
    valid, test = hold_out.valid_percent, hold_out.test_percent
    if not valid + test or hold_out.by == "rows":
        return rule
    if hold_out.by == "group":
        return replace(rule, column=schema.group)
    if hold_out.by == "tail":
        return replace(
            rule, borders=(rows - rows * (valid + test) // 100, rows - rows * test // 100)
        )
    return replace(rule, borders=time_borders(times, valid, test), column=schema.time)


def time_borders(times: OrderStatistics, valid: int, test: int) -> tuple[int, int]:
    """Return when validation and test begin: as asked, or as near as ties of times allow.

    Args:
        times: Of all rows.
        valid: In percent of the rows, the latest before :attr:`test`.
        test: In percent of the rows, the latest.

    Raises:
        DataError: If there are not as many different times as splits.
    """
    if not times.count:
        return 0, 0  # said of the rows: there is none

    def after(percent: int) -> int:
        return times.at(int(np.ceil((times.count - 1) * (1 - percent / 100))))

    first, last = times.at(0), times.at(times.count - 1)
    # The earliest that leave a moment to whatever is before.
    first_valid = _following(times, first)
    first_test = _following(times, first_valid) if valid else first_valid
    test_from = max(after(test), first_test) if test else last + 1
    valid_from = test_from
    if valid:
        before_test = times.at(times.below(test_from) - 1)
        valid_from = max(min(after(valid + test), before_test), first_valid)
    if max(valid_from if valid else first, test_from if test else first) > last:
        splits = 1 + bool(valid) + bool(test)
        raise DataError(
            f"all rows are from {first} to {last}, with fewer than {splits} different times, so "
            f"{splits} splits by time cannot each have a row. Hold rows out with --valid_by rows "
            "or group, or give validation and test files of their own."
        )
    return valid_from, test_from


def _following(times: OrderStatistics, number: int) -> int:
    """Return the next larger number, or one more if there is none."""
    rank = times.up_to(number)
    return times.at(rank) if rank < times.count else number + 1


def check_splits(rows: Mapping[str, int], hold_out: HoldOut | None, where: str) -> None:
    """Refuse a split without a row, unless none was asked for.

    Args:
        rows: Good rows of each split that is wanted.
        hold_out: How rows are held out; null if files or the data set decide.
        where: What was read.

    Raises:
        DataError: Naming the split and what would help.
    """
    for split, count in rows.items():
        if count:
            continue
        if hold_out is None:
            raise DataError(
                f"{where}: no row is left for the {split} split. Take more data, or repair it."
            )
        percent = {"valid": hold_out.valid_percent, "test": hold_out.test_percent}.get(split)
        asked = f" of {percent} %" if percent is not None else ""
        raise DataError(
            f"{where}: no row is left for the {split} split{asked}, held out by {hold_out.by} "
            f"from {sum(rows.values())} good rows. Take more data, another --valid_by, another "
            "percentage (0 asks for no split), or files of its own."
        )


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
