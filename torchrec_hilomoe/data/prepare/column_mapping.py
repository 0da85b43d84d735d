"""How raw columns become a schema's, where they are, and which of their rows are held out.

A data set whose rows are whole in the raw files (histories included) is a :class:`ColumnMapping`
and the files of each split; :mod:`.tables` does the rest. The vocabularies of its schema are yet to
be counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_kinds import read_type, refuse_types
from torchrec_hilomoe.data.prepare.folder import vocabulary_file
from torchrec_hilomoe.data.prepare.records import find_raw
from torchrec_hilomoe.data.prepare.sources import CsvFile, RawFile
from torchrec_hilomoe.data.schema import Schema, VocabularyRule

__all__ = ["HOLD_OUT", "ColumnMapping", "HoldOut", "Inputs", "Value", "counted", "csv_inputs"]

# What raw values are read as: texts, whole numbers, or numbers that are put into buckets.
Value = type[pl.String] | type[pl.Int64] | type[pl.Float64]
HOLD_OUT = ("rows", "group", "time", "tail")


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Which training rows are not trained on, where no file of their own has them.

    Attributes:
        valid_percent: About how many of a hundred rows validate.
        test_percent: About how many test.
        by: ``rows`` at random; whole groups at random (``group``); those after a moment
            (``time``); or the last ones of the files (``tail``).
    """

    valid_percent: int
    test_percent: int = 0
    by: Literal["rows", "group", "time", "tail"]

    def __post_init__(self) -> None:
        for name in ("valid_percent", "test_percent"):
            if not 0 <= getattr(self, name) <= 45:
                raise ValueError(f"--{name} must be from 0 to 45, got {getattr(self, name)}.")
        if self.by not in HOLD_OUT:
            raise ValueError(f"--valid_by must be one of {', '.join(HOLD_OUT)}, got {self.by!r}.")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The raw files of each split, in order.

    Attributes:
        train: At least one.
        valid: May be empty; then training rows are held out.
        test: May be empty, likewise.
    """

    train: tuple[RawFile, ...]
    valid: tuple[RawFile, ...] = ()
    test: tuple[RawFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """How raw columns become the schema's.

    Attributes:
        schema: What is made. A table whose vocabulary is counted or given has any number of rows
            here; it gets its own once it is known.
        raw: The raw column that a column of the schema is made of, if it has another name.
        text: Tables whose raw values are texts; those of others are whole numbers.
        numeric_group: Whether groups are whole numbers in all files; else their texts are hashed.
        separator: Between entries of a list that is stored as text.
        align: Whether parallel lists of unequal lengths are made equal: last entries stand
            together, what lacks is missing in front; else such a row is bad.
        missing_dense: Stands for a missing dense value; without it such a row is bad.
        missing_remedy: What could be done about a missing dense value, for messages.
        constants: Columns of the schema that no raw column gives, and their value.
        dense: What a dense column's numbers become; as they are by default.
        given: Raw values of tables whose vocabulary is given, in the order of their ids.
        counts_cut_entries: Whether entries of lists that ``max_length`` cuts off count for
            vocabularies, as in the public sets' own preprocessing; else no row has their ids.
        reshape: Makes columns of those in the files, before anything else.
        reads: Columns that are read from the files, if they are reshaped.
    """

    schema: Schema
    raw: Mapping[str, str] = field(default_factory=dict)
    text: frozenset[str] = frozenset()
    numeric_group: bool = True
    separator: str = "^"
    align: bool = False
    missing_dense: float | None = None
    missing_remedy: str = ""
    constants: Mapping[str, int] = field(default_factory=dict)
    dense: Callable[[pl.Expr], pl.Expr] | None = None
    given: Mapping[str, pa.Array] = field(default_factory=dict)
    counts_cut_entries: bool = True
    reshape: Callable[[pl.LazyFrame], pl.LazyFrame] | None = None
    reads: tuple[str, ...] | None = None

    def source(self, column: str) -> str:
        """Return the raw column that a column of the schema is made of."""
        return self.raw.get(column, column)

    def value(self, table: str) -> Value:
        """Return what the raw values of a table are."""
        rule = self.schema.vocabularies.get(table)
        if rule is not None and rule.kind == "bucketed":
            return pl.Float64
        return pl.String if table in self.text else pl.Int64

    @property
    def sources(self) -> tuple[str, ...]:
        """Every raw column that is needed, once, after reshaping."""
        wanted = [self.source(name) for name in self.schema.columns if name not in self.constants]
        return tuple(dict.fromkeys(wanted))

    @property
    def wanted(self) -> tuple[str, ...]:
        """Every column that is read from the files."""
        return self.reads if self.reads is not None else self.sources

    def types(self, file: RawFile) -> pa.Schema:
        """Return the columns that are read from a file, and what they are read as.

        Raises:
            DataError: If columns are missing, or have a type that no row can satisfy.
        """
        columns = file.columns()
        missing = [name for name in self.wanted if name not in columns.names]
        if missing:
            raise DataError(
                f"{file.path} lacks the columns {', '.join(missing)}; it has "
                f"{', '.join(columns.names)}. Name the right files with --raw, or correct the "
                "names."
            )
        if self.reshape is not None:
            return pa.schema([(name, pa.large_string()) for name in self.wanted])
        sources = {name: self.source(name) for name in self.schema.columns}
        refuse_types(columns, self.schema, sources, file.path)
        moments = {
            self.source(name) for name in (self.schema.time, *self.schema.event_times) if name
        }
        return pa.schema(
            [
                (name, read_type(columns.field(name).type, moment=name in moments))
                for name in self.wanted
            ]
        )


def counted(table: str, min_count: int) -> VocabularyRule:
    """Return the rule of the public benchmark sets' own preprocessing for a counted vocabulary.

    A value is known if one of the columns that share the vocabulary has it ``min_count`` times; id
    0 is padding and the last id is "unknown". With ``--valid_percent 0`` training rows are all of
    ``train.csv``, and vocabularies have the benchmarks' sizes.
    """
    return VocabularyRule(
        kind="counted", min_count=min_count, unknown="last", file=vocabulary_file(table)
    )


def csv_inputs(raw: str, *, source: str) -> Inputs:
    """Find ``train.csv`` and ``test.csv``, plain or gzipped.

    Raises:
        DataError: If one is missing.
    """
    train, test = (
        CsvFile(find_raw(raw, name, source), source=source) for name in ("train.csv", "test.csv")
    )
    return Inputs(train=(train,), test=(test,))
