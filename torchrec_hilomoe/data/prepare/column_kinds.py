"""Which Arrow types a schema's columns may be read from, and what they are read as.

Text is text whatever holds it (``binary``, ``string_view``, dictionaries), also in lists of every
kind. A type that no row can satisfy is refused before a row is read.
"""

from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.types as pt

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.schema import Schema

__all__ = ["EXACT", "holds_bytes", "is_text", "read_type", "refuse_types", "stored_type"]

LISTS = (
    "is_list",
    "is_large_list",
    "is_fixed_size_list",
    "is_list_view",  # since Arrow 16
    "is_large_list_view",
)
TEXTS = (
    "is_string",
    "is_large_string",
    "is_string_view",
    "is_binary",
    "is_large_binary",
    "is_binary_view",
    "is_fixed_size_binary",
)
IDS = "ids are whole numbers or texts"
EXACT = 2.0**53  # beyond it a float no longer tells one whole number from the next
# What a column is for, in words; and what would do in place of a type that does not.
ONE, MANY, NUMBER, MOMENT = "one id a row", "a list of ids a row", "a number a row", "a time a row"
MOMENTS, NUMBERS = "a list of times a row", "a list of numbers a row"


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return what the values of a type are, without extension, dictionary or kind of list."""
    if isinstance(kind, pa.BaseExtensionType):
        return stored_type(kind.storage_type)
    if pt.is_dictionary(kind):
        return stored_type(kind.value_type)
    if _is(kind, LISTS):
        return pa.large_list(stored_type(kind.value_type))
    return kind


def is_text(kind: pa.DataType) -> bool | None:
    """Say whether values, or entries, are texts; None if there is no value to tell by."""
    kind = stored_type(kind)
    kind = kind.value_type if pt.is_large_list(kind) else kind
    return None if pt.is_null(kind) else _is(kind, TEXTS) or _is_moment(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    """Say whether values are stored as bytes; Parquet files promise UTF-8 and may break it."""
    return _is(kind, TEXTS)


def read_type(kind: pa.DataType, *, moment: bool) -> pa.DataType | None:
    """Return what a column is cast to when it is read; None if nothing can be made of it.

    Args:
        kind: As stored.
        moment: Whether dates and times become seconds; else they are texts, as ids are.
    """
    kind = stored_type(kind)
    if pt.is_large_list(kind):
        entries = read_type(kind.value_type, moment=moment)
        return None if entries is None or pt.is_large_list(entries) else pa.large_list(entries)
    if _is_moment(kind):
        return pa.timestamp("s") if moment else pa.large_string()
    if pt.is_decimal(kind):
        # Whole ones may be beyond 64 bits; whether each is not is known when it is parsed.
        return pa.large_string() if kind.scale == 0 else pa.float64()
    if _is(kind, TEXTS) or pt.is_null(kind) or pt.is_uint64(kind):
        return pa.large_string()
    if pt.is_integer(kind):
        return pa.int64()
    if pt.is_floating(kind):
        return pa.float64()
    return kind if pt.is_boolean(kind) else None


def refuse_types(columns: pa.Schema, schema: Schema, source: Mapping[str, str], path: str) -> None:
    """Refuse columns whose type no row can satisfy.

    Args:
        columns: Of a file.
        schema: What is made of them.
        source: The raw column of each of the schema's.
        path: The file, for the message.

    Raises:
        DataError: Naming file, column, type and what would do.
    """
    for name, use in _uses(schema):
        raw = source.get(name, name)
        found = columns.names.count(raw)
        if found > 1:
            raise DataError(f"{path} has {found} columns of the name {raw!r}; rename all but one.")
        if found and (remedy := _fault(columns.field(raw).type, use)):
            kind = columns.field(raw).type
            raise DataError(f"{path}: column {raw!r} is {kind}, but {name} is {use}; {remedy}.")


def _uses(schema: Schema) -> Iterable[tuple[str, str]]:
    bucketed = {table for table, rule in schema.vocabularies.items() if rule.kind == "bucketed"}
    for feature in (*schema.candidate, *(f for f in schema.pooled if f.max_length == 1)):
        yield feature.name, NUMBER if feature.table in bucketed else ONE
    for feature in (*schema.sequence_fields, *(f for f in schema.pooled if f.max_length > 1)):
        yield feature.name, NUMBERS if feature.table in bucketed else MANY
    for name in schema.event_times:
        yield name, MOMENTS
    for name in (*schema.dense, schema.label, *filter(None, [schema.weight])):
        yield name, NUMBER
    if schema.time is not None:
        yield schema.time, MOMENT
    yield schema.group, ONE


def _fault(kind: pa.DataType, use: str) -> str | None:
    stored = stored_type(kind)
    is_list = pt.is_large_list(stored)
    value = stored.value_type if is_list else stored
    if pt.is_large_list(value):
        return "flatten the lists: one list a row, of plain values"
    if read_type(kind, moment=use in (MOMENT, MOMENTS)) is None:
        return "store its parts as columns of their own, of plain values or lists of them"
    if is_list and use not in (MANY, MOMENTS, NUMBERS):
        more = ", or describe it as a pooled feature with max_length above 1" if use == ONE else ""
        return f"store one value a row{more}"
    if use in (MANY, MOMENTS) and _has_places(value):
        return "store whole numbers, without missing entries" + (
            ", or texts; or give its table a bucketed vocabulary, for numbers"
            if use == MANY
            else ""
        )
    if use in (NUMBER, NUMBERS) and _is_moment(value):
        return "store seconds or days as a number, or name the column as the schema's time"
    if use in (MOMENT, MOMENTS) and pt.is_boolean(value):
        return "store whole seconds, dates or timestamps"
    return None


def _has_places(kind: pa.DataType) -> bool:
    """Say whether numbers may have digits after the point."""
    return pt.is_floating(kind) or (pt.is_decimal(kind) and kind.scale != 0)


def _is_moment(kind: pa.DataType) -> bool:
    return pt.is_date(kind) or pt.is_timestamp(kind)


def _is(kind: pa.DataType, names: Iterable[str]) -> bool:
    # Older releases of Arrow lack the newer types, and so what tells them.
    return any(vars(pt)[name](kind) for name in names if name in vars(pt))
