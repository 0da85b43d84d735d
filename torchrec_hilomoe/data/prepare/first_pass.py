"""The first pass over raw files: values are counted, rows too, bad ones reported.

Shape legend:
    N  rows of a piece
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.hashing import mix64
from torchrec_hilomoe.data.prepare.counting import by_frequency, ValueCounts
from torchrec_hilomoe.data.prepare.parsing import parse, Parsed
from torchrec_hilomoe.data.prepare.pieces import each_piece
from torchrec_hilomoe.data.prepare.plan import Plan
from torchrec_hilomoe.data.prepare.raw import Piece, RawFile
from torchrec_hilomoe.data.prepare.records import BadRecords

__all__ = ["Counted", "count"]

SAMPLED_TIMES = 1 << 18


@dataclass(kw_only=True)
class Counted:
    """What the first pass knows.

    Attributes:
        values: Counts of every column of a counted vocabulary, by table and raw column.
        rows: Of each file, bad ones included and malformed lines not.
        good_rows: Of each file.
        entries: Of all list columns together, over all files.
        times: A sample of the training rows' times, the same whatever the threads.
    """

    values: dict[tuple[str, str], ValueCounts]
    rows: dict[str, int] = field(default_factory=dict)
    good_rows: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    times: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def frequent(self, table: str, min_count: int) -> pa.Array:
        """Return a table's values, the most frequent first.

        A value is known if it is frequent enough in one of the table's columns; columns do not
        add up. Where it is too rare it does not count towards the order either.
        """
        found = [
            counts.at_least(min_count) for (name, _), counts in self.values.items() if name == table
        ]
        whole = pa.concat_tables(found).group_by("value").aggregate([("count", "sum")])
        return by_frequency(whole.rename_columns(["value", "count"]))

    def border(self, percent: int) -> int:
        """Return the moment after which ``percent`` of a hundred training rows are."""
        return int(np.quantile(self.times, 1 - percent / 100, method="higher"))


def count(
    files: Sequence[RawFile],
    train: int,
    plan: Plan,
    *,
    scratch: str,
    workers: int,
    bad: BadRecords,
) -> Counted:
    """Read every file once.

    Args:
        files: Those of training first.
        train: How many those are; vocabularies are theirs.
        plan: What the columns mean.
        scratch: A local folder.
        workers: Threads that parse.
        bad: Is told of bad rows, in the order of files and rows.

    Raises:
        DataError: If a file is unreadable or too many rows are bad.
    """
    counted = Counted(values=_counters(plan, scratch))
    lock = Lock()
    sample = _Sample()

    def look(file: int, piece: Piece) -> dict[int, str]:
        parsed = parse(piece.load(), plan)
        if file < train:
            for (table, raw), counts in counted.values.items():
                counts.add(_values(parsed, plan, table, raw))
        with lock:
            good, rows = len(parsed.good_N), len(parsed.good_N) + len(parsed.bad)
            counted.good_rows[piece.path] = counted.good_rows.get(piece.path, 0) + good
            counted.rows[piece.path] = counted.rows.get(piece.path, 0) + rows
            counted.entries += sum(len(lists.values) for lists in parsed.many.values())
            if file < train and plan.schema.time is not None:
                sample.add(file, piece.first, parsed.good_N, parsed.plain[plan.schema.time])
        return dict(parsed.bad)

    for piece, faults in each_piece(files, plan.wanted, look, workers=workers, title="count"):
        for place, text in piece.malformed:
            bad.add(piece.path, place, text)
        for row, reason in faults.items():
            bad.add(piece.path, piece.place(piece.first + row), reason)
    counted.times = sample.times
    return counted


def _counters(plan: Plan, scratch: str) -> dict[tuple[str, str], ValueCounts]:
    keys = dict.fromkeys(
        (feature.table, plan.source(feature.name))
        for feature in plan.schema.id_features
        if (rule := plan.schema.vocabularies.get(feature.table)) and rule.kind == "counted"
    )
    return {key: ValueCounts(scratch, f"values-{place}") for place, key in enumerate(keys)}


def _values(parsed: Parsed, plan: Plan, table: str, raw: str) -> pa.Array:
    """Return the values of a raw column, of good rows."""
    name = next(
        feature.name
        for feature in plan.schema.id_features
        if (feature.table, plan.source(feature.name)) == (table, raw)
    )
    if name in parsed.single:
        found = parsed.single[name]
        return found if not parsed.bad else found.take(pa.array(parsed.good_N))
    lists = parsed.many[name]
    if not parsed.bad:
        return lists.values
    rows_T = np.repeat(np.arange(len(lists.lengths)), lists.lengths)
    return lists.values.filter(pa.array(np.isin(rows_T, parsed.good_N)))


class _Sample:
    """Keeps the times of those rows whose place hashes lowest: the same for any threads."""

    def __init__(self) -> None:
        self.times = np.empty(0, dtype=np.int64)
        self._keys = np.empty(0, dtype=np.uint64)

    def add(self, file: int, first: int, good_N: np.ndarray, times_N: np.ndarray) -> None:
        keys = mix64((np.uint64(file) << np.uint64(40)) + (first + good_N).astype(np.uint64))
        self._keys = np.concatenate([self._keys, keys])
        self.times = np.concatenate([self.times, times_N[good_N]])
        if len(self._keys) > SAMPLED_TIMES:
            kept = np.argpartition(self._keys, SAMPLED_TIMES)[:SAMPLED_TIMES]
            self._keys, self.times = self._keys[kept], self.times[kept]
