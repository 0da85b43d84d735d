"""What a prepared folder holds, a few rows at a time: clicks, lengths, skew, and signs of leaks.

Shape legend:
    N  rows of a block
    T  entries of a list column, all rows together
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.parquet import check_folder, count_rows, load_schema, ParquetSource
from torchrec_hilomoe.data.prepare.folder import REPORT_FILE
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema
from torchrec_hilomoe.runtime.documents import (
    DocumentError,
    misfit_of_parts,
    parse_json,
    read_text,
)
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = ["Description", "SplitDescription", "describe"]

SPLITS = ("train", "valid", "test")
QUANTILES = (0, 10, 50, 90, 99, 100)


@dataclass(kw_only=True)
class SplitDescription:
    """What was seen of a split.

    Attributes:
        rows: How many.
        clicks: How many of them.
        lengths: For each sequence group, how many rows have 0, 1, 2, ... events.
        ids: For each table, how often each of its ids occurs, in all columns together.
        ids_outside: Ids that their table does not have.
        target_in_history: For each pair of a candidate's and a history's field, rows whose
            candidate is in the history: of clicks, and of other rows.
        events_backwards: Rows whose events are not in the order of time, by sequence group.
        events_after_request: Rows with an event later than the request, by sequence group.
        first_time: The earliest request; null without times.
        last_time: The latest.
    """

    rows: int = 0
    clicks: int = 0
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    ids_outside: int = 0
    target_in_history: dict[str, list[int]] = field(default_factory=dict)
    events_backwards: dict[str, int] = field(default_factory=dict)
    events_after_request: dict[str, int] = field(default_factory=dict)
    first_time: int | None = None
    last_time: int | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """A described folder.

    Attributes:
        dataset: Its name.
        splits: By name; a split without a row is left out.
        shared_groups: How many groups of GAUC each pair of splits shares.
        groups_may_be_shared: Whether the split was by anything but groups.
        warnings: What looks like a leak or a mistake, in words.
    """

    dataset: str
    splits: Mapping[str, SplitDescription]
    shared_groups: Mapping[str, int]
    groups_may_be_shared: bool
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Return a summary as text."""
        summary = {
            "dataset": self.dataset,
            "splits": {name: _summary(split) for name, split in self.splits.items()},
            "shared_groups": dict(self.shared_groups),
            "warnings": list(self.warnings),
        }
        return json.dumps(summary, indent=2)


def describe(folder: str) -> Description:
    """Read every row of a prepared folder once.

    Memory holds a count for each row of each table and the groups of each split, whatever the
    number of rows.

    Raises:
        DataError: If the folder is not whole or unreadable.
    """
    check_folder(folder)
    schema = load_schema(folder)
    splits: dict[str, SplitDescription] = {}
    groups: dict[str, np.ndarray] = {}
    for name in SPLITS:
        if not path_manager.isdir(f"{folder}/{name}") or not count_rows(folder, name):
            continue
        splits[name], groups[name] = _split(ParquetSource(folder, name, schema))
    shared = {
        f"{first} and {second}": len(np.intersect1d(groups[first], groups[second]))
        for place, first in enumerate(splits)
        for second in list(splits)[place + 1 :]
    }
    by_group = _options(folder).get("held_out_by") == "group"
    return Description(
        dataset=schema.dataset,
        splits=splits,
        shared_groups=shared,
        groups_may_be_shared=not by_group,
        warnings=(*_warnings(splits, shared, by_group), *_untrained(splits, schema)),
    )


def _options(folder: str) -> Mapping[str, Any]:
    return _report(folder).get("options", {})


def _report(folder: str) -> Mapping[str, Any]:
    path = f"{folder}/{REPORT_FILE}"
    if not path_manager.isfile(path):
        return {}  # a folder that another tool made
    try:
        found = parse_json(read_text(path), path)
        parts = {"options": Mapping}
        if problem := misfit_of_parts(found, parts):
            raise DocumentError(f"{path} is damaged: {problem}")
        return found
    except DocumentError as error:
        raise DataError(f"{error}. Prepare the data again.") from error


def _split(source: ParquetSource) -> tuple[SplitDescription, np.ndarray]:
    schema = source.schema
    seen = SplitDescription(
        lengths={group.name: np.zeros(1, np.int64) for group in schema.sequences},
        ids={table: np.zeros(rows, np.int64) for table, rows in schema.tables.items()},
        target_in_history={f"{a} in {b}": [0, 0] for a, b in _pairs(schema)},
        events_backwards={group.name: 0 for group in schema.sequences if group.time},
        events_after_request={
            group.name: 0 for group in schema.sequences if group.time and schema.time
        },
    )
    groups = np.empty(0, np.int64)
    for block in range(len(source.block_rows)):
        table = source.read(0, block)
        _look(seen, schema, table)
        found = _flat(table, schema.group)
        groups = np.union1d(groups, found)
    return seen, groups


def _pairs(schema: Schema) -> list[tuple[str, str]]:
    """Return the candidate's and the histories' fields that share a table."""
    return [
        (candidate.name, event.name)
        for candidate in schema.candidate
        for event in schema.sequence_fields
        if candidate.table == event.table
    ]


def _look(seen: SplitDescription, schema: Schema, table: pa.Table) -> None:
    clicked_N = _flat(table, schema.label) == 1
    seen.rows += len(clicked_N)
    seen.clicks += int(clicked_N.sum())
    for feature in schema.id_features:
        _count_ids(seen, feature, table)
    for group in schema.sequences:
        lengths_N = np.diff(_lists(table, group.fields[0].name)[1])
        counts = np.bincount(lengths_N, minlength=len(seen.lengths[group.name]))
        counts[: len(seen.lengths[group.name])] += seen.lengths[group.name]
        seen.lengths[group.name] = counts
    for candidate, events in _pairs(schema):
        flat_T, offsets = _lists(table, events)
        target_N = _flat(table, candidate)
        same_T = flat_T == np.repeat(target_N, np.diff(offsets))
        # Padding and "unknown" may stand for any values.
        inside_N = _any(same_T & (flat_T != 0), offsets)
        pair = seen.target_in_history[f"{candidate} in {events}"]
        pair[0] += int((inside_N & clicked_N).sum())
        pair[1] += int((inside_N & ~clicked_N).sum())
    _look_at_times(seen, schema, table)


def _look_at_times(seen: SplitDescription, schema: Schema, table: pa.Table) -> None:
    time_N = None if schema.time is None else _flat(table, schema.time)
    if time_N is not None and len(time_N):
        first, last = int(time_N.min()), int(time_N.max())
        seen.first_time = first if seen.first_time is None else min(seen.first_time, first)
        seen.last_time = last if seen.last_time is None else max(seen.last_time, last)
    for group in schema.sequences:
        if group.time is None:
            continue
        times_T, offsets = _lists(table, group.time)
        earlier_T = np.zeros(len(times_T), dtype=bool)
        earlier_T[1:] = times_T[1:] < times_T[:-1]
        begins = offsets[:-1][np.diff(offsets) > 0]
        earlier_T[begins] = False
        seen.events_backwards[group.name] += int(_any(earlier_T, offsets).sum())
        if time_N is not None:
            late_T = times_T > np.repeat(time_N, np.diff(offsets))
            seen.events_after_request[group.name] += int(_any(late_T, offsets).sum())


def _count_ids(seen: SplitDescription, feature: IdFeature | PooledFeature, table: pa.Table) -> None:
    column = table.column(feature.name).type
    many = pa.types.is_list(column) or pa.types.is_large_list(column)
    ids = _lists(table, feature.name)[0] if many else _flat(table, feature.name)
    counts = seen.ids[feature.table]
    inside = (ids >= 0) & (ids < len(counts))
    seen.ids_outside += int((~inside).sum())
    counts += np.bincount(ids[inside], minlength=len(counts))


def _flat(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    if column.null_count:
        raise DataError(f"column {name!r} has nulls. Prepare the data again.")
    return column.to_numpy().astype(np.int64)


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = table.column(name).combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    flat = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    return flat.to_numpy(zero_copy_only=False).astype(np.int64), offsets - offsets[0]


def _any(marked_T: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    before = np.concatenate([[0], np.cumsum(marked_T)])
    return before[offsets[1:]] > before[offsets[:-1]]


def _warnings(
    splits: Mapping[str, SplitDescription], shared: Mapping[str, int], by_group: bool
) -> list[str]:
    found = []
    for name, split in splits.items():
        for group, rows in split.events_backwards.items():
            if rows:
                found.append(f"{name}: {rows} rows have events of {group!r} that run backwards")
        for group, rows in split.events_after_request.items():
            if rows:
                found.append(f"{name}: {rows} rows have events of {group!r} after the request")
        for pair, (clicks, others) in split.target_in_history.items():
            rates = clicks / max(split.clicks, 1), others / max(split.rows - split.clicks, 1)
            if abs(rates[0] - rates[1]) > TELLING and clicks + others:
                found.append(
                    f"{name}: {pair} for {rates[0]:.1%} of clicks and {rates[1]:.1%} of other "
                    "rows, which tells the label; was the event itself left in the history?"
                )
        if split.ids_outside:
            found.append(f"{name}: {split.ids_outside} ids are outside their tables")
        if not 0 < split.clicks < split.rows:
            found.append(f"{name}: all labels are equal")
    names = [name for name in splits if splits[name].last_time is not None]
    for first, second in zip(names, names[1:], strict=False):
        last, begin = splits[first].last_time, splits[second].first_time
        assert last is not None
        assert begin is not None
        if last > begin:
            found.append(f"{first} ends at {last}, after {second} begins at {begin}")
    if by_group and shared.get("train and valid"):
        found.append(
            f"{shared['train and valid']} groups are in train and in valid, which were to be apart"
        )
    return found


def _untrained(splits: Mapping[str, SplitDescription], schema: Schema) -> Iterator[str]:
    """Yield tables whose row of unknown values is looked up and never trained."""
    for name, split in splits.items():
        for table, counts in split.ids.items():
            row = schema.unknown_id(table)
            seen = splits["train"].ids[table][row] if "train" in splits else 1
            if counts[row] and not seen and table not in schema.frozen:
                yield (
                    f"{name}: {counts[row] / counts.sum():.1%} of the ids of table {table!r} are "
                    f"{row}, which stands for unknown values and is never trained, so predictions "
                    "there are arbitrary; rare values train it where min_count is above 1"
                )


# Random negatives are in a history less often than clicks where users come back to items; above
# this difference the history all but says the label.
TELLING = 0.5


def _summary(split: SplitDescription) -> dict[str, Any]:
    summary = asdict(split)
    summary["label_rate"] = split.clicks / split.rows
    summary["lengths"] = {name: _quantiles(counts) for name, counts in split.lengths.items()}
    summary["ids"] = {table: _skew(counts) for table, counts in split.ids.items()}
    summary["target_in_history"] = {
        pair: {
            "share_of_clicks": round(clicks / max(split.clicks, 1), 4),
            "share_of_other_rows": round(others / max(split.rows - split.clicks, 1), 4),
        }
        for pair, (clicks, others) in split.target_in_history.items()
    }
    return {name: value for name, value in summary.items() if value is not None}


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    rows = counts.sum()
    ends = np.cumsum(counts)
    found = {f"p{q}": int(np.searchsorted(ends, max(1, rows * q / 100))) for q in QUANTILES}
    return {**found, "mean": round(float(counts @ np.arange(len(counts)) / max(rows, 1)), 2)}


def _skew(counts: np.ndarray) -> dict[str, float]:
    """Say how many ids occur and how much of all occurrences the most frequent have."""
    total = max(int(counts.sum()), 1)
    falling = np.sort(counts)[::-1]
    hundredth = falling[: max(1, len(counts) // 100)].sum()
    return {
        "rows": len(counts),
        "seen": int((counts > 0).sum()),
        "padding": round(float(counts[0] / total), 4),
        "most_frequent": round(float(falling[0] / total), 4),
        "most_frequent_1_percent": round(float(hundredth / total), 4),
    }
