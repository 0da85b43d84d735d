"""What a :class:`~torchrec_hilomoe.data.schema.Schema` is made of, each part checked by itself."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from torch import nn

__all__ = [
    "FrozenTable",
    "IdFeature",
    "PooledFeature",
    "SequenceGroup",
    "VocabularyRule",
    "check_tables",
]

MOST_ROWS = 1 << 40  # a trillion
MOST_BUCKETS = 1 << 16
# A table becomes a module of a dictionary of modules, a prefix of parameters, a file.
TABLE_NAME = re.compile(r"\w[\w -]{0,99}")
TAKEN = frozenset(dir(nn.ModuleDict()))
POOLED = "_pooled"  # the copy of a table for features that are pooled


def check_tables(tables: Mapping[str, int]) -> None:
    """Refuse names of tables that cannot name a module and a file, and sizes that no table has.

    Raises:
        ValueError: Naming the table and what would do.
    """
    for table, rows in tables.items():
        if not isinstance(table, str) or not TABLE_NAME.fullmatch(table):
            raise ValueError(
                f"Schema.tables: {table!r} cannot name a table, which names a module and a file; "
                "take 1 to 100 letters, digits, '_', '-' and spaces."
            )
        if table in TAKEN:
            raise ValueError(
                f"Schema.tables: {table!r} is an attribute of PyTorch's modules; take another "
                f"name, such as {table + '_id'!r}."
            )
        if table.endswith(POOLED) and table.removesuffix(POOLED) in tables:
            raise ValueError(
                f"Schema.tables: {table!r} is what the pooled copy of table "
                f"{table.removesuffix(POOLED)!r} is called; rename one."
            )
        if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= MOST_ROWS:
            raise ValueError(
                f"Schema.tables[{table!r}] must be a whole number of at least 1 (id 0 is "
                f"padding) and at most {MOST_ROWS}, got {rows!r}."
            )


@dataclass(frozen=True, kw_only=True)
class IdFeature:
    """A categorical column looked up one vector an id.

    Attributes:
        name: Name of the column, and its key in the jagged tensor.
        table: Name of the embedding table that its ids index.

    Example:
        >>> IdFeature(name="item_id", table="item").table
        'item'
    """

    name: str
    table: str


@dataclass(frozen=True, kw_only=True)
class PooledFeature:
    """A categorical column whose vectors are averaged into one: context, or a bag of ids.

    Attributes:
        name: Name of the column, and its key in the jagged tensor.
        table: Name of the embedding table that its ids index.
        max_length: Largest number of ids of a row: 1 for a plain column, more for a list column,
            of which the last ones are kept.

    Example:
        >>> PooledFeature(name="tags", table="tag", max_length=10).max_length
        10
    """

    name: str
    table: str
    max_length: int = 1

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(
                f"Schema.pooled[{self.name!r}].max_length must be at least 1 (1 is a plain "
                f"column), got {self.max_length}."
            )


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """Parallel list columns of equal lengths: one entry an event, the oldest first.

    Attributes:
        name: Name of the group, for messages.
        fields: Columns of the events; those that share a table with a candidate field describe
            the same property of the event as that field does of the candidate.
        max_length: Largest number of events of a row; longer rows are cut.
        keep: End of a longer row that is kept: ``"last"`` (the latest events) or ``"first"``.
        time: List column of the times of the events, parallel to the fields, in whole seconds.

    Example:
        >>> clicks = IdFeature(name="clicked_items", table="item")
        >>> SequenceGroup(name="clicks", fields=(clicks,), max_length=50).keep
        'last'
    """

    name: str
    fields: tuple[IdFeature, ...]
    max_length: int
    keep: Literal["last", "first"] = "last"
    time: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1 or not self.fields:
            raise ValueError(
                f"Schema.sequences[{self.name!r}] needs fields and max_length of at least 1, "
                f"got {len(self.fields)} fields and max_length {self.max_length}."
            )
        if self.keep not in ("last", "first"):
            raise ValueError(
                f"Schema.sequences[{self.name!r}].keep must be 'last' or 'first', "
                f"got {self.keep!r}."
            )


@dataclass(frozen=True, kw_only=True)
class FrozenTable:
    """Vectors that come with the data and are never trained, such as those of images.

    Attributes:
        width: Width of a vector, in features; a multiple of 4, which FBGEMM's kernels want.
        file: File of the vectors, one row an id: ``.npy`` of float32 beside the schema.

    Example:
        >>> FrozenTable(width=64, file="covers.npy").width
        64
    """

    width: int
    file: str

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(
                f"Schema.frozen: width must be a multiple of 4, got {self.width}; pad the vectors "
                "with zeros."
            )
        path = PurePosixPath(self.file)
        if not self.file or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"Schema.frozen: file must be a path below the schema's folder, got {self.file!r}."
            )


@dataclass(frozen=True, kw_only=True)
class VocabularyRule:
    """How the raw values of a table's columns became ids; id 0 is padding.

    Attributes:
        kind: Source of the values: ``counted``: those that occur often enough in training rows;
            ``given``: those of a list; ``hashed``: every value has a row, which it may share;
            ``bucketed``: numbers, in buckets with about as many training values each.
        min_count: Smallest number of occurrences of a ``counted`` value; rarer ones are unknown.
        unknown: Row of unknown values: ``zero``, with padding, or ``last``, their own. Of numbers,
            only missing ones (null, not a number) are unknown.
        buckets: Largest number of buckets of a ``bucketed`` vocabulary; null for the others.
        file: File of the values and their ids, beside the schema; null if ``hashed``.

    Example:
        >>> VocabularyRule(kind="counted", min_count=2).unknown
        'zero'
    """

    kind: Literal["counted", "given", "hashed", "bucketed"]
    min_count: int = 1
    unknown: Literal["zero", "last"] = "zero"
    buckets: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        for name, valid in (
            ("kind", ("counted", "given", "hashed", "bucketed")),
            ("unknown", ("zero", "last")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"Schema.vocabularies: {name} must be one of {', '.join(valid)}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.min_count < 1 or (self.min_count > 1 and self.kind != "counted"):
            raise ValueError(
                f"Schema.vocabularies: min_count is {self.min_count} for a {self.kind} vocabulary; "
                "it must be at least 1, and only counted ones may have more."
            )
        if self.kind == "hashed" and self.unknown != "zero":
            raise ValueError(
                f"Schema.vocabularies: unknown is {self.unknown!r} for a hashed vocabulary, of "
                "which every value has a row and only a missing one is unknown, with padding; "
                "leave it out, or set it to 'zero'."
            )
        if (self.buckets is None) == (self.kind == "bucketed"):
            raise ValueError(
                f"Schema.vocabularies: buckets is {self.buckets} for a {self.kind} vocabulary; "
                "bucketed ones want a number, such as 32, and others have none."
            )
        if self.buckets is not None and not 2 <= self.buckets <= MOST_BUCKETS:
            raise ValueError(
                f"Schema.vocabularies: buckets must be from 2 to {MOST_BUCKETS}, got "
                f"{self.buckets}."
            )
