"""Anyone's own Parquet files: rows that hold the label, the candidate and the history already.

The description is a schema file, in YAML or JSON, as the prepared folder's own, with three
differences: tables whose vocabulary is counted or given need no size; ``file`` of a frozen table or
of a given vocabulary is a raw file; and ``columns`` may name the raw column that a column is made
of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.column_kinds import (
    is_text,
    read_type,
    refuse_types,
    stored_type,
)
from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, HoldOut, Inputs
from torchrec_hilomoe.data.prepare.folder import Report, vectors_file, vocabulary_file
from torchrec_hilomoe.data.prepare.options import Common
from torchrec_hilomoe.data.prepare.sources import ParquetFile
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.prepare.vectors import Vectors
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.runtime.documents import misfit
from torchrec_hilomoe.runtime.paths import open_binary, open_text, path_manager

__all__ = ["Description", "prepare_parquet"]

SPLITS = ("train", "valid", "test")


def prepare_parquet(
    *,
    raw: str,
    schema: str,
    valid_percent: int = 5,
    test_percent: int = 5,
    valid_by: Literal["rows", "group", "time", "tail"] | None = None,
    separator: str = "^",
    fill_dense: float | None = None,
    **common: Unpack[Common],
) -> Report:
    """Prepare your own Parquet files, as a schema file describes them.

    Args:
        raw: Folder with train/, valid/ and test/, each of .parquet files, in folders of its own or
            not, or train.parquet and so on. Without validation or test files, training rows are
            held out.
        schema: A YAML or JSON file that says what the columns are.
        valid_percent: About how many of a hundred training rows validate, without such files.
        test_percent: About how many test, without such files.
        valid_by: Which rows are held out: random ``rows``, those of random values of the group
            (``group``), the latest (``time``) or the last of the files (``tail``); by default the
            latest if the schema has a time, else random rows.
        separator: Between entries of lists that are stored as text.
        fill_dense: Stands for a missing dense value; without it such a row is bad.
        common: Options that every command has.

    Returns:
        The report that is also written.

    Raises:
        DataError: If raw files are missing or too malformed, or ``out`` is taken.
        ValueError: If an option is out of range, or the schema file is wrong.
    """
    raw = raw.rstrip("/")
    inputs = Inputs(**{split: _files(raw, split) for split in SPLITS})
    if not inputs.train:
        raise DataError(
            f"{raw} has neither a folder train with .parquet files nor train.parquet. Name the "
            "folder that has with --raw."
        )
    description = Description.read(schema)
    files = [file for split in SPLITS for file in getattr(inputs, split)]
    kinds = [file.columns() for file in files]
    for file, columns in zip(files, kinds, strict=True):
        refuse_types(columns, description.schema, description.columns, file.path)
    frozen = description.schema.frozen
    vectors = {table: Vectors(f"{raw}/{given.file}") for table, given in frozen.items()}
    text = _text_tables(description, kinds)
    given = _given(description.schema, vectors, raw, text)
    _check_order(description.schema, vectors, given)
    mapping = ColumnMapping(
        schema=_finished(description.schema, vectors),
        raw=description.raw,
        text=text,
        numeric_group=not _is_text_group(description, kinds),
        separator=separator,
        missing_dense=fill_dense,
        missing_remedy="; --fill_dense NUMBER gives missing ones a value",
        given=given,
        counts_cut_entries=False,
    )
    by_time = "time" if mapping.schema.time is not None else "rows"
    if valid_by == "time" and mapping.schema.time is None:
        raise ValueError("--valid_by is 'time', but the schema names no time; choose another.")
    return prepare_tables(
        inputs,
        mapping,
        hold_out=HoldOut(
            valid_percent=valid_percent, test_percent=test_percent, by=valid_by or by_time
        ),
        vectors=vectors,
        named={} if fill_dense is None else {"fill_dense": fill_dense},
        **common,
    )


@dataclass(frozen=True, kw_only=True)
class Description:
    """A user's schema file.

    Attributes:
        schema: As described; tables that are to be counted have any size.
        columns: The raw column of columns that have another name.
    """

    schema: Schema
    columns: Mapping[str, str]

    @property
    def raw(self) -> dict[str, str]:
        """The raw column of every column that has another name, the group's own included."""
        group = self.schema.group
        source = self.columns.get(group, group)
        return {f"{group}_group": source, **self.columns}

    @classmethod
    def read(cls, path: str) -> "Description":
        """Read a file; its mistakes are a ValueError that names it."""
        if not path_manager.isfile(path):
            raise DataError(f"there is no schema file {path}. Name it with --schema.")
        try:
            with open_text(path) as source:
                found = yaml.safe_load(source.read().removeprefix("\ufeff"))
            if not isinstance(found, dict):
                raise ValueError("it is no mapping of names to values")
            columns = found.pop("columns", None) or {}
            if problem := misfit(columns, Mapping[str, str], "columns"):
                raise ValueError(f"{problem}; map a column to its raw one: {{item: sku}}")
            found.pop("version", None)
            rules, sizes = (found.get(part) or {} for part in ("vocabularies", "tables"))
            if isinstance(rules, dict) and isinstance(sizes, dict):  # else the schema refuses them
                counted = {
                    table: 2
                    for table, rule in rules.items()
                    if isinstance(rule, dict) and rule.get("kind") != "hashed"
                }
                found["tables"] = counted | sizes
            schema = Schema.from_dict(found)
            used = {feature.table for feature in schema.id_features}
            if idle := [table for table in schema.vocabularies if table not in used]:
                raise ValueError(
                    f"vocabularies names table {idle[0]!r}, which no feature has; remove it, or "
                    "give a feature that table"
                )
            return cls(schema=schema, columns=columns)
        except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a schema: {reason}") from error


def _finished(schema: Schema, vectors: Mapping[str, Vectors]) -> Schema:
    """Say where things will be in the prepared folder, and give the group a column of its own."""
    for table, found in vectors.items():
        wanted = schema.frozen[table].width
        if found.width != wanted:
            raise DataError(
                f"{found.path} has vectors of width {found.width}, the schema says {wanted} for "
                f"frozen table {table!r}; correct one of them."
            )
    features = {feature.name for feature in schema.id_features}
    return replace(
        schema,
        # Ids would put all users that are unknown into one group.
        group=f"{schema.group}_group" if schema.group in features else schema.group,
        frozen={
            table: replace(frozen, file=vectors_file(table))
            for table, frozen in schema.frozen.items()
        },
        vocabularies={
            table: replace(rule, file=None if rule.kind == "hashed" else vocabulary_file(table))
            for table, rule in schema.vocabularies.items()
        },
    )


def _text_tables(description: Description, kinds: Sequence[pa.Schema]) -> frozenset[str]:
    """Return the tables whose raw columns hold texts in any file."""
    found: dict[str, dict[bool, str]] = {}
    schema = description.schema
    for feature in schema.id_features:
        raw = description.columns.get(feature.name, feature.name)
        rule = schema.vocabularies.get(feature.table)
        if rule is not None and rule.kind == "bucketed":
            continue  # numbers
        for file in kinds:
            if file.names.count(raw) != 1:
                continue  # reported with all that are missing or occur twice
            kind = file.field(raw).type
            text = is_text(kind)
            if rule is not None and rule.kind == "hashed" and _is_unsigned(kind):
                # Fingerprints of 64 bits. A number and its text have the same hash.
                found.setdefault(feature.table, {})[True] = raw
            elif text is not None:
                found.setdefault(feature.table, {})[text] = raw
    for table, columns in found.items():
        hashed = table in schema.vocabularies and schema.vocabularies[table].kind == "hashed"
        if len(columns) == 2 and not hashed:
            raise DataError(
                f"table {table!r} is indexed by {columns[True]}, which holds texts, and by "
                f"{columns[False]}, which holds numbers; give them one type in all files."
            )
        if True in columns and table not in schema.vocabularies:
            raise DataError(
                f"column {columns[True]} holds texts, but table {table!r} has no vocabulary; add "
                f"it to the schema's vocabularies, as counted, given or hashed."
            )
    return frozenset(table for table, columns in found.items() if True in columns)


def _is_text_group(description: Description, kinds: Sequence[pa.Schema]) -> bool:
    """Say whether any file has groups that are read as texts: then those of all files are."""
    group = description.schema.group
    raw = description.columns.get(group, group)
    stored = [stored_type(file.field(raw).type) for file in kinds if file.names.count(raw) == 1]
    return any(
        read_type(kind, moment=False) == pa.large_string()
        for kind in stored
        if not pa.types.is_null(kind)  # no value to tell by
    )


def _is_unsigned(kind: pa.DataType) -> bool:
    kind = stored_type(kind)
    return pa.types.is_uint64(kind.value_type if pa.types.is_large_list(kind) else kind)


def _given(
    schema: Schema, vectors: Mapping[str, Vectors], raw: str, text: frozenset[str]
) -> dict[str, pa.Array]:
    """Return the values of given vocabularies: those of the vectors, or of a file."""
    found: dict[str, pa.Array] = {}
    for table, rule in schema.vocabularies.items():
        if rule.kind != "given":
            continue
        if rule.file is None and table in vectors:
            found[table] = vectors[table].keys
        elif rule.file is None:
            raise ValueError(
                f"the vocabulary of table {table!r} is given, but names no file; name one with a "
                "value a line, or Parquet with a column value."
            )
        else:
            found[table] = _values(f"{raw}/{rule.file}", text=table in text)
            if len(found[table].unique()) != len(found[table]):
                raise DataError(f"{raw}/{rule.file} has a value twice; keep each once.")
        if table in text:
            found[table] = found[table].cast(pa.string())
        elif not pa.types.is_integer(found[table].type):
            raise DataError(
                f"the vocabulary of table {table!r} is given as texts, but its columns hold "
                "numbers; give them one type."
            )
    return found


def _check_order(
    schema: Schema, vectors: Mapping[str, Vectors], given: Mapping[str, pa.Array]
) -> None:
    """Refuse vectors that would be those of other ids: they are stored in the order of keys."""
    for table, found in vectors.items():
        count = len(found.keys)
        values = given.get(table)
        if table not in schema.vocabularies:  # values are ids
            values = pa.array(range(1, min(schema.tables[table], count + 1)), pa.int64())
        if values is None or not values[:count].cast(pa.string()).equals(
            found.keys.cast(pa.string())
        ):
            raise DataError(
                f"{found.path} has its vectors in another order than table {table!r} has ids; "
                "give the table the vocabulary {kind: given}, without a file: ids follow the keys "
                "of the vectors then."
            )


def _values(path: str, *, text: bool) -> pa.Array:
    """Return the values of a file; lines are numbers where all are, unless ``text``."""
    try:
        if path.endswith(".parquet"):
            with open_binary(path) as source:
                values = pq.read_table(source, columns=["value"])["value"].combine_chunks()
                return values.cast(pa.string()) if is_text(values.type) else values
        with open_text(path) as source:
            lines = source.read().removeprefix("\ufeff").split("\n")
            lines = [line.rstrip("\r") for line in lines]
    except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the vocabulary {path} cannot be read ({reason}).") from error
    texts = pa.array([line for line in lines if line], pa.string())
    if text:
        return texts  # 02139 and 2139 are two
    try:
        return texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return texts


def _files(raw: str, split: str) -> tuple[ParquetFile, ...]:
    """Find a split's files; whatever has its name and is none is refused."""
    if not path_manager.isdir(raw):
        return ()
    names = [name for name in sorted(path_manager.ls(raw)) if name.partition(".")[0] == split]
    if not names:
        return ()
    if len(names) > 1:
        raise DataError(f"{raw} has {' and '.join(names)}; leave one for the {split} split.")
    (name,) = names
    path = f"{raw}/{name}"
    if path_manager.isdir(path):
        found = tuple(_below(path))
        if not found:
            raise DataError(
                f"{path} holds no .parquet file. Put the {split} rows in, or remove it."
            )
        return tuple(map(ParquetFile, found))
    if name != f"{split}.parquet":
        raise DataError(
            f"{path} is no Parquet, but has the name of the {split} split. Convert it to "
            f"{split}.parquet, or rename it."
        )
    return (ParquetFile(path),)


def _below(folder: str) -> Iterator[str]:
    """Yield the Parquet files in a folder and in those below it, as Spark and Hive write them."""
    for name in sorted(path_manager.ls(folder)):
        if name.startswith((".", "_")):
            continue  # marks and checksums that systems leave
        path = f"{folder}/{name}"
        if path_manager.isdir(path):
            yield from _below(path)
        elif name.endswith(".parquet"):
            yield path
