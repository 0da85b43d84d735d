"""What a data set's columns are: the one source for embedding tables, KJT keys and checks.

A folder of Parquet files carries its schema as ``schema.json``. Ids are dense integers below
their table's number of rows; 0 is padding and "unknown" in every table.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torchrec_hilomoe.runtime.paths import open_text

__all__ = ["IdFeature", "PooledFeature", "Schema", "SequenceGroup"]

SCHEMA_VERSION = 1
SCHEMA_FILE = "schema.json"


@dataclass(frozen=True, kw_only=True)
class IdFeature:
    """A categorical column looked up one vector an id.

    Attributes:
        name: Column, and the key in the jagged tensor.
        table: The embedding table that its ids index.
    """

    name: str
    table: str


@dataclass(frozen=True, kw_only=True)
class PooledFeature:
    """A categorical column whose vectors are summed into one: context, or a bag of ids.

    Attributes:
        name: Column, and the key in the jagged tensor.
        table: The embedding table that its ids index.
        max_length: 1 for a plain integer column; more for a list column, which is cut to its
            last ``max_length`` ids.
    """

    name: str
    table: str
    max_length: int = 1


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """Parallel list columns of equal lengths: one entry an event.

    Attributes:
        name: What the events are, for messages.
        fields: The columns; those that share a table with a candidate field describe the same
            property of the event as that field does of the candidate.
        max_length: Longer rows are cut to this many events.
        keep: Which end survives the cut: ``"last"`` (the latest events) or ``"first"``.
    """

    name: str
    fields: tuple[IdFeature, ...]
    max_length: int
    keep: Literal["last", "first"] = "last"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a click log.

    Attributes:
        dataset: Its name, for reports.
        tables: Table name to number of rows, id 0 included.
        candidate: Fields of the item that may be clicked, one integer a row.
        sequences: The behaviour histories.
        pooled: User, context and multi-valued fields.
        dense: Float columns.
        label: The column of 0/1 clicks.
        group: The integer column whose values GAUC averages over.

    Raises:
        ValueError: If a feature names an unknown table, a column occurs twice, a size is below
            1, the group is no id, or no candidate field is given.
    """

    dataset: str
    tables: Mapping[str, int]
    candidate: tuple[IdFeature, ...]
    sequences: tuple[SequenceGroup, ...] = ()
    pooled: tuple[PooledFeature, ...] = ()
    dense: tuple[str, ...] = ()
    label: str = "label"
    group: str = "user"

    def __post_init__(self) -> None:
        if not self.candidate:
            raise ValueError("Schema.candidate is empty; name at least the candidate's id column.")
        self._check_names()
        for table, rows in self.tables.items():
            if rows < 1:
                raise ValueError(
                    f"Schema.tables[{table!r}] must be at least 1 (id 0 is padding), got {rows}."
                )
        for feature in self.pooled:
            if feature.max_length < 1:
                raise ValueError(
                    f"Schema.pooled[{feature.name!r}].max_length must be at least 1 (1 is a plain "
                    f"column), got {feature.max_length}."
                )
        for group in self.sequences:
            if group.max_length < 1 or not group.fields:
                raise ValueError(
                    f"Schema.sequences[{group.name!r}] needs fields and max_length of at least 1, "
                    f"got {len(group.fields)} fields and max_length {group.max_length}."
                )
            if group.keep not in ("last", "first"):
                raise ValueError(
                    f"Schema.sequences[{group.name!r}].keep must be 'last' or 'first', "
                    f"got {group.keep!r}."
                )

    def _check_names(self) -> None:
        names = [*(feature.name for feature in self.id_features), *self.dense, self.label]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"Schema: column names {repeated} occur twice; rename one of each.")
        for feature in self.id_features:
            if feature.table not in self.tables:
                near = get_close_matches(feature.table, self.tables, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Add it or correct the name."
                raise ValueError(
                    f"Schema: feature {feature.name!r} wants table {feature.table!r}, but "
                    f"Schema.tables has {sorted(self.tables)}. {hint}"
                )
        lists = {field.name for field in self.sequence_fields}
        lists |= {feature.name for feature in self.pooled if feature.max_length > 1}
        if self.group in {*lists, *self.dense, self.label}:
            raise ValueError(
                f"Schema.group {self.group!r} is a list, a dense column or the label; name a "
                "column of one integer a row."
            )

    @property
    def sequence_fields(self) -> tuple[IdFeature, ...]:
        """Every history column, group by group."""
        return tuple(field for group in self.sequences for field in group.fields)

    @property
    def unpooled_keys(self) -> tuple[str, ...]:
        """Keys of ``CTRBatch.unpooled``: the candidate's, then the histories'."""
        return tuple(field.name for field in (*self.candidate, *self.sequence_fields))

    @property
    def pooled_keys(self) -> tuple[str, ...]:
        """Keys of ``CTRBatch.pooled``."""
        return tuple(feature.name for feature in self.pooled)

    @property
    def id_features(self) -> tuple[IdFeature | PooledFeature, ...]:
        """Every column of ids."""
        return (*self.candidate, *self.sequence_fields, *self.pooled)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that a batch needs, each once."""
        ids = [feature.name for feature in self.id_features]
        return tuple(dict.fromkeys([*ids, *self.dense, self.label, self.group]))

    def to_json(self) -> str:
        """Serialise, with the format's version."""
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError: If the version is not this package's.
        """
        raw: dict[str, Any] = json.loads(text)
        version = raw.pop("version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema version is {version}, this package reads {SCHEMA_VERSION}; "
                "prepare the data again with apps/prepare.py."
            )
        raw["candidate"] = tuple(IdFeature(**field) for field in raw["candidate"])
        raw["pooled"] = tuple(PooledFeature(**field) for field in raw["pooled"])
        raw["dense"] = tuple(raw["dense"])
        raw["sequences"] = tuple(
            SequenceGroup(**{**group, "fields": tuple(IdFeature(**f) for f in group["fields"])})
            for group in raw["sequences"]
        )
        return cls(**raw)

    def save(self, path: str) -> None:
        """Write the schema to ``path``."""
        with open_text(path, "w") as sink:
            sink.write(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str) -> "Schema":
        """Read the schema at ``path``."""
        with open_text(path) as source:
            return cls.from_json(source.read())
