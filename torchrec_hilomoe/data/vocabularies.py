"""What a vocabulary must be to belong to a schema, for whoever reads one."""

from collections.abc import Iterator

import pyarrow as pa

from torchrec_hilomoe.data.schema import Schema

__all__ = ["vocabulary_faults"]


def vocabulary_faults(vocabulary: pa.Table, schema: Schema, table: str) -> Iterator[str]:
    """Say what is wrong with a table's vocabulary: each value once, ids from 1 on, the right size.

    Args:
        vocabulary: Columns ``value`` and ``id``.
        schema: Says how many rows the table has, and which of them is of unknown values.
        table: Its name.

    Yields:
        A fault in words; none if the vocabulary fits.

    Raises:
        ArrowException: If ids are no whole numbers.
    """
    ids = vocabulary["id"].cast(pa.int64()).to_pylist()
    if sorted(ids, key=lambda it: it or 0) != list(range(1, len(ids) + 1)):
        yield f"ids are not 1 to {len(ids)}, each once"
    if len(vocabulary["value"].unique()) != len(ids):
        yield "a value occurs twice"
    rows = schema.tables[table]
    wanted = len(ids) + (2 if schema.vocabularies[table].unknown == "last" else 1)
    if wanted != rows:
        yield f"{len(ids)} values want {wanted} rows of table {table!r}, schema says {rows}"
