"""What every data set's preparation has in common once its records are encoded.

Shape legend:
    N  rows of the data set
    M  rows that are asked for
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_hilomoe.data.prepare.folder import prepared_folder, PreparedFolder, Report
from torchrec_hilomoe.data.prepare.records import BadRecords
from torchrec_hilomoe.data.schema import IdFeature, Schema, SequenceGroup

__all__ = ["SPLITS", "EncodedLog", "ReadLog", "check_least", "history_group", "prepare_log"]

SPLITS = ("train", "valid", "test")


class EncodedLog(ABC):
    """A data set in memory as ids, from which rows are made when they are written."""

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """What the columns mean."""

    @property
    @abstractmethod
    def split_N(self) -> np.ndarray:
        """Index into ``SPLITS`` of each row."""

    @property
    @abstractmethod
    def notes(self) -> Mapping[str, int]:
        """Counts for the report that are particular to the data set."""

    @abstractmethod
    def rows(self, rows_M: np.ndarray) -> pa.Table:
        """Return rows by their numbers, in that order."""


@dataclass(frozen=True, kw_only=True)
class ReadLog:
    """A log that was read.

    Attributes:
        log: Its good records.
        rows_read: How many those are.
    """

    log: EncodedLog
    rows_read: int


def prepare_log(
    read: Callable[[BadRecords], ReadLog],
    *,
    out: str,
    lengths: Mapping[str, int],
    seed: int,
    max_bad_rows: int,
    overwrite: bool,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Check what every such data set's options have in common, read, and write.

    Args:
        read: Reads the raw files; is given what counts malformed records.
        out: Folder to make.
        lengths: Options that limit lists, which a list of one would make plain columns.
        seed: Of what is drawn, and of the order in which training rows are written.
        max_bad_rows: Malformed raw records that are skipped before it is fatal.
        overwrite: Replace prepared data that is in the way.
        options: Further ones that change the result, for the report.
    """
    check_least(2, **lengths)
    check_least(0, seed=seed, max_bad_rows=max_bad_rows)
    with prepared_folder(out, overwrite=overwrite) as folder:
        bad = BadRecords(max_bad_rows)
        found = read(bad)
        return write_log(
            folder,
            found.log,
            seed=seed,
            options={**(options or {}), **lengths},
            rows_read=found.rows_read,
            bad=bad,
        )


def history_group(tables: Mapping[str, str], max_length: int) -> SequenceGroup:
    """Return the usual history: columns ``history_NAME`` of tables by name, oldest event first."""
    return SequenceGroup(
        name="history",
        fields=tuple(
            IdFeature(name=f"history_{name}", table=table) for name, table in tables.items()
        ),
        max_length=max_length,
    )


def check_least(least: int, **options: int) -> None:
    """Refuse options that are too small.

    Raises:
        ValueError: Naming the option, its value and the least.
    """
    for name, value in options.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")


def write_log(
    folder: PreparedFolder,
    log: EncodedLog,
    *,
    seed: int,
    options: Mapping[str, Any],
    rows_read: int,
    bad: BadRecords,
) -> Report:
    """Write schema, splits and report.

    Args:
        folder: Where to.
        log: What.
        seed: Of the order of the training rows.
        options: Those that change the result, for the report.
        rows_read: Raw records, without the bad ones.
        bad: The bad ones.

    Returns:
        The report.
    """
    folder.write_schema(log.schema)
    splits = {}
    for code, name in enumerate(SPLITS):
        rows_M = np.flatnonzero(log.split_N == code)
        if name == "train":
            # A row group is the unit of shuffling between blocks. In the order of users or of
            # time it would hold a few users or one hour only, and so would a batch.
            rows_M = np.random.default_rng(seed).permutation(rows_M)
        splits[name] = folder.write_split(
            name, len(rows_M), lambda start, stop, rows_M=rows_M: log.rows(rows_M[start:stop])
        )
    report = Report(
        dataset=log.schema.dataset,
        options={**options, "seed": seed},
        rows_read=rows_read + bad.counts.total(),
        rows_kept=sum(split.rows for split in splits.values()),
        rows_bad=dict(bad.counts),
        vocabularies=dict(log.schema.tables),
        splits=splits,
        notes=dict(log.notes),
    )
    folder.write_report(report)
    return report
