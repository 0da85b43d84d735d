"""A piece of a raw table becomes typed columns under the schema's names, and its bad rows known.

Shape legend:
    N  rows of the piece
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.hashing import hash64
from torchrec_hilomoe.data.prepare.plan import Plan
from torchrec_hilomoe.data.prepare.values import (
    aligned,
    BadRows,
    Lists,
    numbers,
    real_numbers,
    token_lists,
    tokens,
)
from torchrec_hilomoe.data.schema import PooledFeature

__all__ = ["Parsed", "parse"]


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """Typed columns of a piece.

    Attributes:
        single: Raw ids of columns with one a row, by name; a null is missing.
        many: Raw ids, and times, of list columns.
        dense: ``(N,)`` float32, the weight too.
        plain: ``(N,)`` int64: label, group, time.
        bad: Bad rows and what is wrong with them.
        good_N: The other rows.
    """

    single: Mapping[str, pa.Array]
    many: Mapping[str, Lists]
    dense: Mapping[str, np.ndarray]
    plain: Mapping[str, np.ndarray]
    bad: Mapping[int, str]
    good_N: np.ndarray


def parse(table: pa.Table, plan: Plan) -> Parsed:
    """Parse the rows of a raw table, in whichever thread."""
    if plan.reshape is not None:
        table = plan.reshape(table)
    schema, bad = plan.schema, BadRows(table.num_rows)
    single: dict[str, pa.Array] = {}
    many: dict[str, Lists] = {}
    done: dict[tuple[str, bool], pa.Array | Lists] = {}  # a raw column may have several uses
    for feature in schema.id_features:
        raw, text = plan.source(feature.name), feature.table in plan.text
        lists = feature in schema.sequence_fields
        lists |= isinstance(feature, PooledFeature) and feature.max_length > 1
        if (raw, text) not in done:
            column = table.column(raw)
            done[raw, text] = (
                token_lists(column, raw, bad, text=text, separator=plan.separator)
                if lists
                else tokens(column, raw, bad, text=text)
            )
        found = done[raw, text]
        if feature.table not in schema.vocabularies:
            _check_range(found, raw, schema.tables[feature.table], bad)
        if isinstance(found, Lists):
            many[feature.name] = found
        else:
            single[feature.name] = found
    for name in schema.event_times:
        raw = plan.source(name)
        many[name] = token_lists(table.column(raw), raw, bad, text=False, separator=plan.separator)
    _check_parallel(plan, many, bad)
    dense = {name: _dense(table, name, plan, bad) for name in schema.dense}
    if schema.weight is not None:
        raw = plan.source(schema.weight)
        weights_N = real_numbers(table.column(raw), raw, bad)
        bad.add(weights_N < 0, f"{raw} is below 0")
        dense[schema.weight] = weights_N
    return Parsed(
        single=single,
        many=many,
        dense=dense,
        plain=_plain(table, plan, bad),
        bad=bad.reasons(),
        good_N=np.flatnonzero(~bad.bad_N),
    )


def _check_range(found: pa.Array | Lists, raw: str, rows: int, bad: BadRows) -> None:
    """Mark rows with an id that its table does not have."""
    values = found.values if isinstance(found, Lists) else pc.fill_null(found, 0)
    ids = values.to_numpy(zero_copy_only=False)
    wrong = (ids < 0) | (ids >= rows)
    if isinstance(found, Lists) and wrong.any():
        before = np.concatenate([[0], np.cumsum(wrong)])
        wrong = before[found.offsets[1:]] > before[found.offsets[:-1]]
    if wrong.any():
        bad.add(wrong, f"{raw} has an id outside its table's 0 to {rows - 1}")


def _check_parallel(plan: Plan, many: dict[str, Lists], bad: BadRows) -> None:
    for group in plan.schema.sequences:
        names = [field.name for field in group.fields] + ([group.time] if group.time else [])
        if plan.align:
            many |= zip(names, aligned([many[name] for name in names]), strict=True)
            continue
        first, *others = names
        for other in others:
            unequal_N = many[other].lengths != many[first].lengths
            bad.add(
                unequal_N,
                f"{plan.source(first)} and {plan.source(other)} have unequal numbers of events",
            )


def _dense(table: pa.Table, name: str, plan: Plan, bad: BadRows) -> np.ndarray:
    raw = plan.source(name)
    found_N = real_numbers(table.column(raw), raw, bad, missing=plan.missing_dense)
    if plan.dense is None:
        return found_N
    return pc.cast(plan.dense(pa.array(found_N)), pa.float32()).to_numpy(zero_copy_only=False)


def _plain(table: pa.Table, plan: Plan, bad: BadRows) -> dict[str, np.ndarray]:
    schema = plan.schema
    raw = plan.source(schema.label)
    labels_N = real_numbers(table.column(raw), raw, bad)
    bad.add((labels_N != 0) & (labels_N != 1), f"{raw} is neither 0 nor 1")
    plain = {schema.label: (labels_N == 1).astype(np.int64)}
    for name, value in plan.constants.items():
        plain[name] = np.full(table.num_rows, value, dtype=np.int64)
    if schema.time is not None:
        raw = plan.source(schema.time)
        plain[schema.time] = numbers(table.column(raw), raw, bad)
    if schema.group not in plain and schema.group not in _id_names(plan):
        plain[schema.group] = _group(table.column(plan.source(schema.group)), plan, bad)
    return plain


def _id_names(plan: Plan) -> set[str]:
    return {feature.name for feature in plan.schema.id_features}


def _group(column: pa.ChunkedArray, plan: Plan, bad: BadRows) -> np.ndarray:
    """Return numbers as they are and the hashes of texts, which must only be told apart."""
    raw = plan.source(plan.schema.group)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text and not plan.numeric_group:
        texts = pc.cast(column.combine_chunks(), pa.large_string())
        bad.add(texts.is_null().to_numpy(zero_copy_only=False), f"{raw} is missing")
        return (hash64(texts) >> np.uint64(1)).astype(np.int64)
    return numbers(column, raw, bad)
