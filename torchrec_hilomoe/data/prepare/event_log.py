"""A log of events: what happened, to whom, and when. A row needs what its user did before.

How one data set's raw records become events, and a few users' events become rows, in the steps of
:mod:`.log`. Whatever a step gives depends on whole users only, so it is the same however many users
are looked at together.

Shape legend:
    N  events of some users, sorted
    R  rows that they become
    M  rows that are asked for
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.prepare.sources import RawFile
from torchrec_hilomoe.data.schema import Schema

__all__ = ["Counting", "EncodedEvents", "Encoding", "EventLog", "Read", "Tally"]


@dataclass(frozen=True, kw_only=True)
class Read:
    """A batch of the raw file.

    Attributes:
        events: Of good records.
        good: How many records those are.
        bad: The other records: where each is, and what is there.
    """

    events: pl.DataFrame
    good: int
    bad: Sequence[tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts that add up over users.

    Attributes:
        rows: That the events become.
        trained: Of them, those that train.
        entries: Of all their lists.
        numbered: What gets numbers in order, such as users or requests.
        notes: For the report.
    """

    rows: int = 0
    trained: int = 0
    entries: int = 0
    numbered: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        notes = Counter(self.notes)
        notes.update(other.notes)  # unlike a sum of counters, keeps zeros
        return Tally(
            rows=self.rows + other.rows,
            trained=self.trained + other.trained,
            entries=self.entries + other.entries,
            numbered=self.numbered + other.numbered,
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True)
class EncodedEvents:
    """Some users' events as ids, from which rows are made when they are written.

    Attributes:
        split_R: Index into ``shards.SPLITS`` of each row.
        rows: Makes rows of their numbers ``(M,)``, in that order.
    """

    split_R: np.ndarray
    rows: Callable[[np.ndarray], pa.Table]


class Encoding(ABC):
    """Knows every vocabulary."""

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """What the columns mean."""

    @property
    @abstractmethod
    def notes(self) -> Mapping[str, int]:
        """Counts for the report that are not added up over users."""

    @property
    def vocabularies(self) -> Mapping[str, pl.Series]:
        """Raw values of tables that the schema names files of, the one with id 1 first."""
        return {}

    @abstractmethod
    def encode(self, events: pa.Table, before: Tally) -> EncodedEvents:
        """Encode some users' events, in whichever thread.

        Args:
            events: All of them, sorted.
            before: What the users before these came to.
        """


class Counting(ABC):
    """Counts values over all users.

    Attributes:
        records: Good ones of smaller files.
    """

    records: int = 0

    @abstractmethod
    def count(self, events: pa.Table) -> Tally:
        """Count some users' events, sorted, in whichever thread."""

    @abstractmethod
    def encoding(self) -> Encoding:
        """Return what encodes, once all users are counted."""


class EventLog(ABC):
    """A data set's raw records.

    Attributes:
        file: Where they are.
        columns: Those of the file that are needed, and the types that they are read as.
        order: Columns of events that put them in order: the user first; the last one tells any two
            events apart.
        nothing: What to tell whoever names a file without any event.
    """

    file: RawFile
    columns: pa.Schema
    order: tuple[str, ...]
    nothing: str

    @abstractmethod
    def read(self, batch: pl.DataFrame) -> Read:
        """Read a batch of the file's rows, in whichever thread."""

    @abstractmethod
    def counting(self, scratch: str, bad: BadRecords) -> Counting:
        """Read smaller files, and return what counts, once all rows are read.

        Args:
            scratch: A local folder.
            bad: Is told of malformed records.

        Raises:
            DataError: If there is nothing to count, or a file is unreadable.
        """
