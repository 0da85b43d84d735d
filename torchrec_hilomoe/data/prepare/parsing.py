"""Raw columns become typed ones under the schema's names, and what is wrong with a row is said.

Text is taken for what the schema wants of it; typed columns keep their type if it fits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl

from torchrec_hilomoe.data.hashing import hash64
from torchrec_hilomoe.data.prepare.column_kinds import EXACT
from torchrec_hilomoe.data.prepare.column_mapping import ColumnMapping, Value
from torchrec_hilomoe.data.prepare.sources import MALFORMED, PLACE, ROW
from torchrec_hilomoe.data.schema import PooledFeature

__all__ = ["FAULT", "hashed_text", "parse"]

FAULT = "__fault"  # what is wrong with a row; null if nothing is
WORDS: dict[Value, str] = {
    pl.String: "text",
    pl.Int64: "whole number",
    pl.Float64: "number",
}
CLICKS = "1 is a click and 0 is none, so make one of ratings or counts by a threshold"


def parse(rows: pl.LazyFrame, mapping: ColumnMapping) -> pl.LazyFrame:
    """Return ``ROW``, ``PLACE``, ``FAULT`` and the columns of the schema, typed but not encoded.

    Args:
        rows: Of what :meth:`~.sources.RawFile.batches` yields.
        mapping: What the columns mean.
    """
    if mapping.reshape is not None:
        rows = mapping.reshape(rows)
    found = _Parsing(mapping=mapping, kinds=rows.collect_schema())
    found.add_ids()
    found.add_parallel()
    found.add_numbers()
    typed = [column.alias(name) for name, column in found.columns.items()]
    faults = [fault.alias(f"__fault_{number}") for number, (fault, _) in enumerate(found.faults)]
    rows = rows.select(ROW, PLACE, MALFORMED, *typed, *faults)
    rows = rows.with_columns(found.together)
    reasons = [
        pl.when(f"__fault_{number}").then(pl.lit(reason))
        for number, (_, reason) in enumerate(found.faults)
    ]
    reasons += [pl.when(fault).then(pl.lit(reason)) for fault, reason in found.late_faults]
    fault = pl.coalesce(MALFORMED, *reasons, pl.lit(None, pl.String))
    return rows.select(ROW, PLACE, fault.alias(FAULT), *found.columns)


@dataclass(kw_only=True)
class _Parsing:
    """Expressions for every column.

    Attributes:
        mapping: What the columns mean.
        kinds: Polars' types of the raw columns.
        columns: By the schema's name, of raw columns.
        faults: What makes a row bad, of raw columns, and the reason; the first one is told.
        together: Columns that are made of several typed ones.
        late_faults: What makes a row bad, of typed columns.
    """

    mapping: ColumnMapping
    kinds: Mapping[str, pl.DataType]
    columns: dict[str, pl.Expr] = field(default_factory=dict)
    faults: list[tuple[pl.Expr, str]] = field(default_factory=list)
    together: list[pl.Expr] = field(default_factory=list)
    late_faults: list[tuple[pl.Expr, str]] = field(default_factory=list)

    def add_ids(self) -> None:
        """Add columns of ids, and events' times."""
        schema = self.mapping.schema
        done: dict[tuple[str, Value], pl.Expr] = {}  # a raw column may have several uses
        for feature in schema.id_features:
            raw, value = self.mapping.source(feature.name), self.mapping.value(feature.table)
            many = feature in schema.sequence_fields
            many |= isinstance(feature, PooledFeature) and feature.max_length > 1
            if (raw, value) not in done:
                done[raw, value] = self._many(raw, value) if many else self._one(raw, value)
            column = self.columns[feature.name] = done[raw, value]
            if feature.table not in schema.vocabularies:
                rows = schema.tables[feature.table]
                outside = f"{raw} has an id outside its table's 0 to {rows - 1}"
                self._fault(column, many, lambda c, n=rows: (c < 0) | (c >= n), outside)
        for name in schema.event_times:
            self.columns[name] = self._many(self.mapping.source(name), pl.Int64)

    def add_parallel(self) -> None:
        """Make parallel lists equally long, or say where they are not."""
        for group in self.mapping.schema.sequences:
            names = [f.name for f in group.fields] + ([group.time] if group.time else [])
            lengths = {name: pl.col(name).list.len() for name in names}
            if self.mapping.align:
                most = pl.max_horizontal(*lengths.values())
                for name in names:
                    nothing = pl.lit(None, pl.Int64).repeat_by(most - lengths[name])
                    self.together.append(pl.concat_list(nothing, pl.col(name)).alias(name))
                continue
            for other in names[1:]:
                pair = " and ".join(self.mapping.source(name) for name in (names[0], other))
                reason = f"{pair} have unequal numbers of events"
                self.late_faults.append((lengths[other] != lengths[names[0]], reason))

    def add_numbers(self) -> None:
        """Add everything else: dense columns, weight, label, constants, time, group."""
        mapping, schema = self.mapping, self.mapping.schema
        for name in schema.dense:
            found = self._number(mapping.source(name), missing=mapping.missing_dense)
            self.columns[name] = found if mapping.dense is None else mapping.dense(found)
        if schema.weight is not None:
            raw = mapping.source(schema.weight)
            self.columns[schema.weight] = weight = self._number(raw)
            self.faults.append((weight < 0, f"{raw} is below 0"))
        raw = mapping.source(schema.label)
        label = self._number(raw)
        wrong = (label != 0) & (label != 1)
        self.faults.append((wrong, f"{raw} is neither 0 nor 1: {CLICKS}"))
        self.columns[schema.label] = (label == 1).cast(pl.Int8)
        for name, value in mapping.constants.items():
            self.columns[name] = pl.lit(value, pl.Int64)
        if schema.time is not None:
            self.columns[schema.time] = self._whole(mapping.source(schema.time))
        if schema.group not in self.columns:
            raw = mapping.source(schema.group)
            if mapping.numeric_group:
                self.columns[schema.group] = self._whole(raw)
            else:
                is_text = self.kinds[raw] == pl.String
                # The number of one file is the text of another.
                text = pl.col(raw) if is_text else self._whole(raw).cast(pl.String)
                self.faults.append((text.is_null(), f"{raw} is missing"))
                self.columns[schema.group] = text.map_batches(hashed_text, pl.Int64)

    def _fault(
        self, column: pl.Expr, many: bool, wrong: Callable[[pl.Expr], pl.Expr], reason: str
    ) -> None:
        """Mark rows whose value, or one of whose entries, is wrong."""
        fault = column.list.eval(wrong(pl.element())).list.any() if many else wrong(column)
        self.faults.append((fault, reason))

    def _one(self, raw: str, value: Value) -> pl.Expr:
        """Return a column of raw values; a null is a missing one."""
        column, kind = pl.col(raw), self.kinds[raw]
        # In a table of texts too a number is written as a whole one: 7.0 is 7, and true is 1.
        is_number = kind.is_float() or kind == pl.Boolean
        if value == pl.String and not is_number:
            return column.cast(pl.String)
        wanted: Value = pl.Int64 if value == pl.String else value
        if wanted == pl.Float64:
            found = column.cast(pl.Float64, strict=False)
        else:
            found = _integers(column, kind)
        fault = column.is_not_null() & found.is_null()
        self.faults.append((fault, f"{raw} is no {WORDS[wanted]}"))
        return found.cast(value)

    def _many(self, raw: str, value: Value) -> pl.Expr:
        """Return a column of lists of raw values; a null is an empty list."""
        column, kind = pl.col(raw), self.kinds[raw]
        if not isinstance(kind, pl.List):
            joined = column.cast(pl.String)
            joined = pl.when(joined != "").then(joined)
            column, kind = joined.str.split(self.mapping.separator), pl.List(pl.String)
        if isinstance(kind.inner, pl.Datetime):
            column = column.list.eval(pl.element().dt.epoch("s"))
        lists = column.cast(pl.List(value), strict=False)
        lists = lists.fill_null(pl.lit([], pl.List(value)))
        reason = f"{raw} has an entry that is no {WORDS[value]}"
        if value == pl.String:
            self._fault(lists, True, lambda c: c.is_null() | (c == ""), reason)
        elif value == pl.Float64:  # a missing number is unknown
            nulls = lists.list.eval(pl.element().is_null()).list.sum()
            given = column.fill_null(pl.lit([], kind)).list.eval(pl.element().is_null()).list.sum()
            self.faults.append((nulls > given, reason))
        else:
            self._fault(lists, True, lambda c: c.is_null(), reason)
        return lists

    def _whole(self, raw: str) -> pl.Expr:
        """Return a column of whole numbers, Int64; a missing one is bad."""
        whole = _integers(pl.col(raw), self.kinds[raw])
        self.faults.append((pl.col(raw).is_null(), f"{raw} is missing"))
        self.faults.append((whole.is_null(), f"{raw} is no whole number"))
        return whole

    def _number(self, raw: str, missing: float | None = None) -> pl.Expr:
        """Return a column of finite numbers, Float32; a null may be filled, else it is bad."""
        column = pl.col(raw)
        found = column.cast(pl.Float64, strict=False)
        if missing is not None:
            found = pl.when(column.is_null()).then(missing).otherwise(found)
        else:
            is_dense = raw in map(self.mapping.source, self.mapping.schema.dense)
            reason = f"{raw} is missing{self.mapping.missing_remedy if is_dense else ''}"
            self.faults.append((column.is_null(), reason))
        found = found.cast(pl.Float32)
        self.faults.append((~found.is_finite().fill_null(False), f"{raw} is no finite number"))
        return found


def hashed_text(texts: pl.Series) -> pl.Series:
    """Return a number that tells texts apart, Int64."""
    return pl.Series(texts.name, (hash64(texts.to_arrow()) >> 1).astype("int64"))


def _integers(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Return Int64, null where there is no whole number."""
    if isinstance(kind, pl.Datetime):
        return column.dt.epoch("s")
    if kind.is_float():
        fits = column.is_finite() & (column.abs() < EXACT) & (column == column.floor())
        column = pl.when(fits).then(column)
    return column.cast(pl.Int64, strict=False)
