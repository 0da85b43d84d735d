"""What a data set's columns are: the one source for embedding tables, KJT keys and checks.

A folder of Parquet files carries its schema as ``schema.json``. Ids are dense integers below
their table's number of rows; 0 is padding and "unknown" in every table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, Field, field, fields, MISSING
from difflib import get_close_matches
from typing import Any, get_type_hints

from torchrec_hilomoe.data.schema_parts import (
    check_tables,
    FrozenTable,
    IdFeature,
    PooledFeature,
    SequenceGroup,
    VocabularyRule,
)
from torchrec_hilomoe.runtime.documents import misfit_of_parts, parse_json, read_text
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
LISTS, MAPPINGS = (
    ("candidate", "sequences", "pooled", "dense"),
    ("tables", "frozen", "vocabularies"),
)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a click log.

    Attributes:
        dataset: Name of the data set, for reports.
        tables: Number of rows of each embedding table, id 0 included.
        candidate: Columns of the item that may be clicked, one id a row.
        sequences: Behaviour histories.
        pooled: User, context and multi-valued columns.
        dense: Columns of numbers.
        label: Column of clicks, 0 or 1.
        group: Column of ids over whose values GAUC averages.
        time: Column of the time when the candidate was shown, in whole seconds; null if unknown.
        weight: Column of row weights, from 0; null if every row has weight 1.
        frozen: Tables that come with the data and are never trained.
        vocabularies: Rules by which the raw values of a table became ids; the raw values of a
            table that is left out are its ids.

    Raises:
        ValueError: If a feature names an unknown table, a column occurs twice, a size is below
            1, the group is no id, or no candidate field is given.

    Example:
        >>> schema = Schema(
        ...     dataset="mine",
        ...     tables={"item": 1000, "user": 50},
        ...     candidate=(IdFeature(name="item_id", table="item"),),
        ...     pooled=(PooledFeature(name="user", table="user"),),
        ... )
        >>> schema.columns
        ('item_id', 'user', 'label')
        >>> Schema.from_json(schema.to_json()) == schema
        True
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
        check_tables(self.tables)
        for table, rule in self.vocabularies.items():
            if rule.kind == "hashed" and self.tables[table] < 2:
                raise ValueError(
                    f"Schema.tables[{table!r}] is {self.tables[table]}, but row 0 is padding, and "
                    "values of a hashed vocabulary share the others; give it at least 2, better a "
                    "few for each value."
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
        """Keys of ``CTRBatch.unpooled``."""
        return tuple(field.name for field in self.unpooled_features)

    @property
    def pooled_keys(self) -> tuple[str, ...]:
        """Keys of ``CTRBatch.pooled``."""
        return tuple(feature.name for feature in self.pooled_features)

    @property
    def unpooled_features(self) -> tuple[IdFeature, ...]:
        """Columns of which each id's vector is wanted: the candidate's, then the histories'.

        None where there are no histories, whose tables the candidate would share: all is looked up
        in one collection then.
        """
        return (*self.candidate, *self.sequence_fields) if self.sequences else ()

    @property
    def pooled_features(self) -> tuple[IdFeature | PooledFeature, ...]:
        """Columns of which each row's mean vector is wanted."""
        return self.pooled if self.sequences else (*self.candidate, *self.pooled)

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

    def unknown_id(self, table: str) -> int:
        """Return the id of a table's unknown values."""
        rule = self.vocabularies.get(table)
        return self.tables[table] - 1 if rule is not None and rule.unknown == "last" else 0

    def differences(self, other: "Schema") -> tuple[str, ...]:
        """Say where this schema ("here") and another ("there") differ; empty if nowhere."""
        mine, theirs = (json.loads(schema.to_json()) for schema in (self, other))
        return tuple(_differences(mine, theirs))

    def to_json(self) -> str:
        """Serialise, with the format's version."""
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError: If it is no mapping of JSON, the version is not this package's, a key is
                unknown or missing, or a value impossible.
        """
        raw = parse_json(text, "a schema")
        version = raw.pop("version", None)
        if version not in range(1, SCHEMA_VERSION + 1):
            raise ValueError(
                f"schema version is {version}, this package reads 1 to {SCHEMA_VERSION}; "
                "prepare the data again: python -m torchrec_hilomoe prepare."
            )
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Schema":
        """Make a schema of plain mappings and lists, as JSON or YAML give them.

        jsonargparse could do it (``add_class_arguments(Schema)``, ``parse_object``), but it drops
        an unknown key whose value is empty, and its messages name the parts' classes, not what was
        meant. It also takes 40 ms, where this takes .1, and changes the mapping that it is given.

        Raises:
            ValueError: If a key is unknown or missing, or a value impossible.
        """
        values = dict(raw)
        _check_keys("Schema", cls, values)
        for names, hint in ((LISTS, tuple[Any, ...]), (MAPPINGS, Mapping)):
            given = {name: values[name] for name in names if values.get(name) is not None}
            _check_types("Schema", dict.fromkeys(given, hint), given)
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
        hints = get_type_hints(cls)
        del hints["tables"]  # whose sizes are checked with a better word
        _check_types("Schema", hints, values)
        return cls(**values)

    def save(self, path: str) -> None:
        """Write the schema to ``path``."""
        with open_text(path, "w") as sink:
            sink.write(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str) -> "Schema":
        """Read the schema at ``path``; raises as :meth:`from_json` does."""
        return cls.from_json(read_text(path))


def _group(raw: Mapping[str, Any]) -> SequenceGroup:
    if not isinstance(raw, Mapping):
        return _part("Schema.sequences", SequenceGroup, raw)
    if raw.get("fields") is not None:
        _check_types("Schema.sequences", {"fields": tuple[Any, ...]}, raw)
    fields = tuple(
        _part("Schema.sequences.fields", IdFeature, item) for item in raw.get("fields") or ()
    )
    return _part("Schema.sequences", SequenceGroup, {**raw, "fields": fields})


def _part(where: str, kind: type, raw: Any) -> Any:
    if not isinstance(raw, Mapping):
        names = ", ".join(f"{item.name}: ..." for item in fields(kind) if _is_required(item))
        raise ValueError(
            f"{where} is {raw!r}, but must be a mapping of names to values, such as {{{names}}}."
        )
    _check_keys(where, kind, raw)
    _check_types(where, get_type_hints(kind), raw)
    return kind(**raw)


def _check_types(where: str, hints: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    if problem := misfit_of_parts(raw, hints, name=where):
        raise ValueError(f"{problem}.")


def _check_keys(where: str, kind: Any, raw: Mapping[str, Any]) -> None:
    """Refuse keys that are misspelt or missing, before a constructor complains in its own words."""
    known = {item.name: item for item in fields(kind)}
    for key in raw:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            raise ValueError(f"{where} has no {key!r}. {hint}")
    missing = [n for n, item in known.items() if _is_required(item) and n not in raw]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _differences(mine: Any, other: Any, path: str = "") -> list[str]:
    """Say where two nested values differ; items with a name are compared by it.

    Args:
        mine: Mappings, lists and plain values, as ``dataclasses.asdict`` gives them.
        other: Likewise.
        path: Of both.

    Example:
        >>> _differences({"tables": {"item": 5, "age": 2}}, {"tables": {"item": 6}})
        ["tables['age']: 2 here, absent there", "tables['item']: 5 here, 6 there"]
    """
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        found = []
        for key in sorted({*mine, *other}, key=str):
            at = f"{path}[{key!r}]" if path else key
            if key not in mine or key not in other:
                found.append(f"{at}: {_shown(mine, key)} here, {_shown(other, key)} there")
            else:
                found += _differences(mine[key], other[key], at)
        return found
    if _is_named(mine) and _is_named(other):
        found = _differences(_by_name(mine), _by_name(other), path)
        orders = [[item["name"] for item in items] for items in (mine, other)]
        if not found and orders[0] != orders[1]:
            found = [f"{path}: in the order {orders[0]} here, {orders[1]} there"]
        return found
    return [] if mine == other else [f"{path}: {mine!r} here, {other!r} there"]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _is_named(items: Any) -> bool:
    return (
        isinstance(items, Sequence)
        and not isinstance(items, str)
        and all(isinstance(item, Mapping) and "name" in item for item in items)
    )


def _by_name(items: Any) -> dict[str, Mapping[str, Any]]:
    return {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in items}
