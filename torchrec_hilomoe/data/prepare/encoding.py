"""Parsed columns become the columns of the prepared folder: ids, cut lists, numbers.

Shape legend:
    N  good rows of a piece
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.prepare.encoders import Encoder, encoder_of, Hashed, Ids
from torchrec_hilomoe.data.prepare.parsing import Parsed
from torchrec_hilomoe.data.prepare.runs import Runs, runs
from torchrec_hilomoe.data.schema import Schema

__all__ = ["count_unknown", "encode_rows", "encoders_of", "unknown_id"]


def unknown_id(schema: Schema, table: str) -> int:
    """Return the id of a table's unknown values."""
    rule = schema.vocabularies[table]
    return schema.tables[table] - 1 if rule.unknown == "last" else 0


def encoders_of(schema: Schema, vocabularies: Mapping[str, pa.Array]) -> dict[str, Encoder]:
    """Return the encoder of each table.

    Args:
        schema: With the rows of every table.
        vocabularies: Raw values of counted and given tables, in the order of their ids.
    """
    encoders: dict[str, Encoder] = {}
    for table, rows in schema.tables.items():
        if table in vocabularies:
            encoders[table] = encoder_of(vocabularies[table], unknown_id(schema, table))
        else:
            encoders[table] = Hashed(rows) if table in schema.vocabularies else Ids()
    return encoders


def encode_rows(parsed: Parsed, schema: Schema, encoders: Mapping[str, Encoder]) -> pa.Table:
    """Return the good rows of a piece."""
    good_N = pa.array(parsed.good_N, pa.int64())
    columns: dict[str, pa.Array] = {}
    limits = {
        field.name: (group.max_length, group.keep)
        for group in schema.sequences
        for field in group.fields
    }
    limits |= {feature.name: (feature.max_length, "last") for feature in schema.pooled}
    for feature in schema.id_features:
        encode = encoders[feature.table].encode
        if feature.name in parsed.single:
            columns[feature.name] = _int32(encode(parsed.single[feature.name].take(good_N)))
        else:
            kept = _kept(parsed, feature.name, *limits[feature.name])
            taken = parsed.many[feature.name].values.take(pa.array(kept.index))
            columns[feature.name] = _lists(kept, _int32(encode(taken)))
    for group in schema.sequences:
        if group.time is not None:
            kept = _kept(parsed, group.time, group.max_length, group.keep)
            columns[group.time] = _lists(
                kept, parsed.many[group.time].values.take(pa.array(kept.index))
            )
    for name, values_N in parsed.dense.items():
        columns[name] = pa.array(values_N[parsed.good_N])
    for name, values_N in parsed.plain.items():
        kind = pa.int8() if name == schema.label else pa.int64()
        columns[name] = pa.array(values_N[parsed.good_N], kind)
    return pa.table({name: columns[name] for name in schema.columns})


def count_unknown(rows: pa.Table, schema: Schema) -> Counter[str]:
    """Count the ids of unknown values, by table; of lists, as far as they are kept."""
    counts: Counter[str] = Counter()
    for feature in schema.id_features:
        rule = schema.vocabularies.get(feature.table)
        if rule is not None and rule.kind != "hashed":
            column = rows.column(feature.name).combine_chunks()
            ids = column.flatten() if pa.types.is_list(column.type) else column
            unknown = unknown_id(schema, feature.table)
            counts[feature.table] += int((ids.to_numpy(zero_copy_only=False) == unknown).sum())
    return counts


def _kept(parsed: Parsed, name: str, limit: int, keep: str) -> Runs:
    offsets = parsed.many[name].offsets
    starts_N, ends_N = offsets[:-1][parsed.good_N], offsets[1:][parsed.good_N]
    counts_N = np.minimum(ends_N - starts_N, limit)
    return runs(ends_N - counts_N if keep == "last" else starts_N, counts_N)


def _int32(ids: np.ndarray) -> pa.Array:
    return pa.array(ids.astype(np.int32))


def _lists(kept: Runs, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(kept.offsets, pa.int32()), values)
