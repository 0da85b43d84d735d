"""What a data set's columns are: the one source for embedding tables, KJT keys and checks.

A folder of Parquet files carries its schema as ``schema.json``. Ids are dense integers below
their table's number of rows; 0 is padding and "unknown" in every table.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, MISSING
from difflib import get_close_matches
from typing import Any

from torchrec_hilomoe.data.schema_differences import differences
from torchrec_hilomoe.data.schema_parts import (
    FrozenTable,
    IdFeature,
    PooledFeature,
    SequenceGroup,
    VocabularyRule,
)
from torchrec_hilomoe.runtime.paths import open_text

__all__ = [
    "FrozenTable",
    "IdFeature",
    "PooledFeature",
    "Schema",
    "SequenceGroup",
    "VocabularyRule",
]

SCHEMA_VERSION = 2  # 1 had no times, weights, frozen tables or vocabularies, and is read
SCHEMA_FILE = "schema.json"


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
        time: An integer column: when the candidate was shown, in seconds; null if unknown.
        weight: A float column: how much a row counts, from 0; null if all count 1.
        frozen: Those of the tables that come with the data and are never trained.
        vocabularies: How the raw values of a table became ids; a table that is left out has ids
            for raw values.

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
    time: str | None = None
    weight: str | None = None
    frozen: Mapping[str, FrozenTable] = field(default_factory=dict)
    vocabularies: Mapping[str, VocabularyRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.candidate:
            raise ValueError("Schema.candidate is empty; name at least the candidate's id column.")
        self._check_names()
        for table, rows in self.tables.items():
            if rows < 1:
                raise ValueError(
                    f"Schema.tables[{table!r}] must be at least 1 (id 0 is padding), got {rows}."
                )

    def _check_names(self) -> None:
        plain = [name for name in (self.time, self.weight) if name is not None]
        names = [feature.name for feature in self.id_features]
        names += [*self.event_times, *self.dense, self.label, *plain]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"Schema: column names {repeated} occur twice; rename one of each.")
        for feature in self.id_features:
            self._check_table(f"feature {feature.name!r} wants table", feature.table)
        for part in ("frozen", "vocabularies"):
            for table in getattr(self, part):
                self._check_table(f"{part} names table", table)
        lists = {field.name for field in self.sequence_fields} | set(self.event_times)
        lists |= {feature.name for feature in self.pooled if feature.max_length > 1}
        if self.group in {*lists, *self.dense, self.label, self.weight}:
            raise ValueError(
                f"Schema.group {self.group!r} is a list, a dense column, the weight or the label; "
                "name a column of one integer a row."
            )

    def _check_table(self, who: str, table: str) -> None:
        if table not in self.tables:
            near = get_close_matches(table, self.tables, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Add it or correct the name."
            raise ValueError(
                f"Schema: {who} {table!r}, but Schema.tables has {sorted(self.tables)}. {hint}"
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
        plain = [name for name in (self.time, self.weight) if name is not None]
        rest = [*self.dense, self.label, self.group, *self.event_times, *plain]
        return tuple(dict.fromkeys([*ids, *rest]))

    @property
    def event_times(self) -> tuple[str, ...]:
        """Columns of the times of events, of those sequence groups that have one."""
        return tuple(group.time for group in self.sequences if group.time is not None)

    def differences(self, other: "Schema") -> tuple[str, ...]:
        """Say where this schema ("here") and another ("there") differ; empty if nowhere."""
        mine, theirs = (json.loads(schema.to_json()) for schema in (self, other))
        return tuple(differences(mine, theirs))

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
        if version not in range(1, SCHEMA_VERSION + 1):
            raise ValueError(
                f"schema version is {version}, this package reads 1 to {SCHEMA_VERSION}; "
                "prepare the data again with apps/prepare.py."
            )
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Schema":
        """Make a schema of plain mappings and lists, as JSON or YAML give them.

        Raises:
            ValueError: If a key is unknown or missing, or a value impossible.
        """
        values = dict(raw)
        _check_keys("Schema", cls, values)
        for name, part in (("candidate", IdFeature), ("pooled", PooledFeature)):
            values[name] = tuple(
                _part(f"Schema.{name}", part, item) for item in values.get(name) or ()
            )
        values["sequences"] = tuple(_group(item) for item in values.get("sequences") or ())
        values["dense"] = tuple(values.get("dense") or ())
        for name, part in (("frozen", FrozenTable), ("vocabularies", VocabularyRule)):
            values[name] = {
                table: _part(f"Schema.{name}[{table!r}]", part, item)
                for table, item in (values.get(name) or {}).items()
            }
        return cls(**values)

    def save(self, path: str) -> None:
        """Write the schema to ``path``."""
        with open_text(path, "w") as sink:
            sink.write(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str) -> "Schema":
        """Read the schema at ``path``."""
        with open_text(path) as source:
            return cls.from_json(source.read())


def _group(raw: Mapping[str, Any]) -> SequenceGroup:
    fields = tuple(
        _part("Schema.sequences.fields", IdFeature, item) for item in raw.get("fields", ())
    )
    return _part("Schema.sequences", SequenceGroup, {**raw, "fields": fields})


def _part(where: str, kind: type, raw: Mapping[str, Any]) -> Any:
    _check_keys(where, kind, raw)
    return kind(**raw)


def _check_keys(where: str, kind: Any, raw: Mapping[str, Any]) -> None:
    """Refuse keys that are misspelt or missing, before a constructor complains in its own words."""
    known = {item.name: item for item in fields(kind)}
    for key in raw:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            raise ValueError(f"{where} has no {key!r}. {hint}")
    missing = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING and name not in raw
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
