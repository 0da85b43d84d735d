"""Events of any number, brought together by user, in memory that does not grow with them.

While they are read, events collect in runs: as many as memory may hold are sorted by user and
written to a file. A part is a range of users, of all runs. So a part has every event of its users,
parts in order have the users in order, and it can be decided at the end, from what there is, how
many parts are wanted for one to fit memory. Polars' own sort holds all rows: 640 MB of them took
2.6 GB.
"""

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["EventRuns", "Part"]

RUN_BYTES = 1 << 26
PART_BYTES = 1 << 25  # what is made of a part while it is encoded takes some ten times as much
SAMPLES = 64  # users that are looked at to find the ends of a part


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of users; ``None`` is no limit on that side.

    Attributes:
        first: The first of them.
        stop: The first that is beyond.
    """

    first: int | str | None
    stop: int | str | None


class EventRuns:
    """Collects events, and gives them back by users.

    Args:
        scratch: A local folder.
        order: Columns that put events in order: the user, then what says when, and last one that
            tells any two events apart.
    """

    def __init__(self, scratch: str, order: Sequence[str]) -> None:
        self._scratch = scratch
        self._order = tuple(order)
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._runs: list[str] = []
        self.rows = 0
        self.bytes = 0

    def add(self, events: pa.Table) -> None:
        """Take some events, in any order; those of all calls have the same columns."""
        self._pending.append(events)
        self._pending_bytes += events.nbytes
        self.rows += events.num_rows
        self.bytes += events.nbytes
        if self._pending_bytes >= RUN_BYTES:
            self._write_run()

    def parts(self, least: int) -> list[Part]:
        """Cut all users into parts whose events fit memory; call it once all events are there.

        Args:
            least: How many parts there should be, if there are as many users.
        """
        self._write_run()
        wanted = max(least, -(-self.bytes // PART_BYTES))
        every = max(1, self.rows // (wanted * SAMPLES))
        sampled: list[int | str] = []
        for run in self._runs:
            users = _open(run).column(self._order[0])
            sampled += users.take(pa.array(range(0, len(users), every))).to_pylist()
        sampled.sort()
        borders = {sampled[len(sampled) * part // wanted] for part in range(1, wanted)}
        # The first user of all is in the sample; a part that ends there would be empty.
        limits = [None, *sorted(borders - set(sampled[:1])), None]
        return [Part(first=first, stop=stop) for first, stop in pairwise(limits)]

    def read(self, part: Part) -> pa.Table:
        """Return the events of a part, in order, from whichever thread."""
        pieces = []
        for run in self._runs:
            events = _open(run)
            users = events.column(self._order[0])
            start = 0 if part.first is None else _first_at_least(users, part.first)
            stop = len(users) if part.stop is None else _first_at_least(users, part.stop)
            # A copy, so that the run is not mapped while others are: mapped pages count as memory.
            pieces.append(events.take(pa.array(np.arange(start, stop))))
        return _sorted(pa.Table.from_batches(pieces), self._order)

    def _write_run(self) -> None:
        if not self._pending:
            return
        run = os.path.join(self._scratch, f"events-{len(self._runs):05d}.run")
        # Only users need be together here: the rest is put in order with the part's other runs.
        events = _sorted(pa.concat_tables(self._pending), self._order[:1]).combine_chunks()
        self._pending, self._pending_bytes = [], 0
        with pa.OSFile(run, "wb") as sink, pa.ipc.new_file(sink, events.schema) as writer:
            for batch in events.to_batches():
                writer.write_batch(batch)
        self._runs.append(run)


def _open(run: str) -> pa.RecordBatch:
    """Map a run: what is looked at is read, and nothing is held."""
    with pa.memory_map(run) as source:
        return pa.ipc.open_file(source).get_batch(0)


def _sorted(events: pa.Table, order: Sequence[str]) -> pa.Table:
    keys = [(name, "ascending") for name in order]
    return events.take(pc.call_function("sort_indices", [events], pc.SortOptions(keys)))


def _first_at_least(users: pa.Array, user: int | str) -> int:
    return bisect_left(range(len(users)), user, key=lambda row: users[row].as_py())
