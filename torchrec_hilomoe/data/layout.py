"""How a block's columns are grouped in memory, so that a batch is joined with few copies.

Columns of one id a row stand together in one array, and columns of equal lengths have their
lengths once: what a batch costs is the number of arrays that it is sliced from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from torchrec_hilomoe.data.schema import Schema, SequenceGroup

__all__ = ["ColumnLayout", "ParallelLists"]


@dataclass(frozen=True, kw_only=True)
class ParallelLists:
    """List columns whose rows have equal lengths: a sequence group, or one multi-valued feature.

    Attributes:
        ids: Columns of ids, each with its table.
        time: The column of events' times, which is the last of :attr:`columns`.
        max_length: What longer rows are cut to.
        keep: Which end of a longer row stays, ``"last"`` or ``"first"``.
        group: The sequence group, if it is one.
    """

    ids: Mapping[str, str]
    time: str | None
    max_length: int
    keep: str
    group: SequenceGroup | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column."""
        return (*self.ids, *(() if self.time is None else (self.time,)))


@dataclass(frozen=True)
class ColumnLayout:
    """Where each key's ids and lengths are in the arrays of :class:`~.decode.Rows`.

    Args:
        schema: What the columns mean.
    """

    schema: Schema

    @cached_property
    def singles(self) -> dict[str, str]:
        """Keys of one id a row, in the order of keys, each with its table."""
        pooled = [feature for feature in self.schema.pooled if feature.max_length == 1]
        return {feature.name: feature.table for feature in (*self.schema.candidate, *pooled)}

    @cached_property
    def single_type(self) -> type[np.signedinteger]:
        """The narrowest type that the tables of :attr:`singles` allow: it halves what is moved."""
        tables = self.schema.tables
        narrow = all(tables[table] <= 2**31 for table in self.singles.values())
        return np.int32 if narrow else np.int64

    @cached_property
    def lists(self) -> tuple[ParallelLists, ...]:
        """Sequence groups, then multi-valued features."""
        groups = [
            ParallelLists(
                ids={field.name: field.table for field in group.fields},
                time=group.time,
                max_length=group.max_length,
                keep=group.keep,
                group=group,
            )
            for group in self.schema.sequences
        ]
        bags = [
            ParallelLists(
                ids={feature.name: feature.table},
                time=None,
                max_length=feature.max_length,
                keep="last",
                group=None,
            )
            for feature in self.schema.pooled
            if feature.max_length > 1
        ]
        return (*groups, *bags)

    @cached_property
    def unpooled_keys(self) -> list[str]:
        """Keys of ``CTRBatch.unpooled``."""
        return list(self.schema.unpooled_keys)

    @cached_property
    def pooled_keys(self) -> list[str]:
        """Keys of ``CTRBatch.pooled``."""
        return list(self.schema.pooled_keys)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where the ids of each key are, the unpooled ones first, and then the events' times.

        A number below ``len(singles)`` is one of those, any other counts on through the columns of
        :attr:`lists`.
        """
        columns = [*self.singles, *(name for lists in self.lists for name in lists.columns)]
        at = {name: place for place, name in enumerate(columns)}
        names = (*self.unpooled_keys, *self.pooled_keys, *self.schema.event_times)
        return tuple(at[name] for name in names)

    @cached_property
    def list_lengths(self) -> tuple[int, ...]:
        """Which row of ``Rows.lengths`` each of ``Rows.lists`` has."""
        return tuple(row for row, lists in enumerate(self.lists, start=1) for _ in lists.columns)

    @cached_property
    def place_lengths(self) -> np.ndarray:
        """Which row of ``Rows.lengths`` each of :attr:`places` has."""
        return np.array([0] * len(self.singles) + [*self.list_lengths])[[*self.places]]
