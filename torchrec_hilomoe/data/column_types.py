"""Which Arrow types can hold the columns that a schema names: known before a row is read."""

import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.schema import Schema

__all__ = ["check_columns", "is_list"]


def check_columns(columns: pa.Schema, schema: Schema, where: str) -> None:
    """Refuse columns that are missing or whose type cannot hold what the schema says.

    Args:
        columns: The Arrow schema of a file.
        schema: What is wanted.
        where: The file, for the message.

    Raises:
        DataError: Naming every fault.
    """
    lists = {field.name for field in schema.sequence_fields} | set(schema.event_times)
    lists |= {feature.name for feature in schema.pooled if feature.max_length > 1}
    ids = {feature.name for feature in schema.id_features}
    faults = []
    for name in schema.columns:
        if columns.get_field_index(name) < 0:
            how = "occurs twice" if name in columns.names else "is missing"
            faults.append(f"column {name!r} {how}")
            continue
        stored = columns.field(name).type
        if name in lists:
            fits, wanted = is_list(stored) and _is_id(stored.value_type), "a list of integers"
        elif name in ids or name in (schema.group, schema.time):
            fits, wanted = _is_id(stored), "an integer"
        else:
            fits, wanted = _is_number(stored), "a number"
        if not fits:
            faults.append(f"column {name!r} is {stored}, the schema wants {wanted}")
    if faults:
        raise DataError(
            f"{where}: {'; '.join(faults)}. Prepare the data again, or correct its schema.json."
        )


def is_list(stored: pa.DataType) -> bool:
    """Say whether a column of this type has many entries a row."""
    return pa.types.is_list(stored) or pa.types.is_large_list(stored)


def _is_id(stored: pa.DataType) -> bool:
    return pa.types.is_integer(stored)


def _is_number(stored: pa.DataType) -> bool:
    floating = pa.types.is_floating(stored)
    return floating or pa.types.is_integer(stored) or pa.types.is_boolean(stored)
