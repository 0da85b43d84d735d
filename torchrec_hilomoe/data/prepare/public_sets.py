"""What the public benchmark sets have in common: ``train.csv``, ``test.csv``, and their rules.

Rules are those of the benchmark's own preprocessing: a value is known if one of the columns that
share the vocabulary has it ``min_count`` times; id 0 is padding and the last id is "unknown".
Values are counted in training rows alone. With ``--valid_percent 0`` these are all of ``train.csv``
and vocabularies have the benchmark's sizes.
"""

from collections.abc import Mapping
from typing import Any, Unpack

from torchrec_hilomoe.data.prepare.folder import prepared_folder, Report, vocabulary_file
from torchrec_hilomoe.data.prepare.options import Common, Options
from torchrec_hilomoe.data.prepare.plan import HoldOut, Inputs, Plan
from torchrec_hilomoe.data.prepare.records import find_raw
from torchrec_hilomoe.data.prepare.sources import CsvFile
from torchrec_hilomoe.data.prepare.tables import prepare_tables
from torchrec_hilomoe.data.prepare.vectors import Vectors
from torchrec_hilomoe.data.schema import VocabularyRule

__all__ = ["counted", "csv_inputs", "prepare_set"]


def counted(table: str, min_count: int) -> VocabularyRule:
    """Return the benchmark's rule for a counted vocabulary."""
    return VocabularyRule(
        kind="counted", min_count=min_count, unknown="last", file=vocabulary_file(table)
    )


def csv_inputs(raw: str, *, source: str) -> Inputs:
    """Find ``train.csv`` and ``test.csv``, plain or gzipped.

    Raises:
        DataError: If one is missing.
    """
    train, test = (
        CsvFile(find_raw(raw, name, source), source=source) for name in ("train.csv", "test.csv")
    )
    return Inputs(train=(train,), test=(test,))


def prepare_set(
    inputs: Inputs,
    plan: Plan,
    *,
    hold_out: HoldOut,
    vectors: Mapping[str, Vectors] | None = None,
    named: Mapping[str, Any] | None = None,
    **common: Unpack[Common],
) -> Report:
    """Prepare a set whose rows are whole in its files; arguments as in ``prepare_tables``."""
    options = Options(**common)
    with prepared_folder(options.out, overwrite=options.overwrite) as folder:
        return prepare_tables(
            folder,
            inputs,
            plan,
            options,
            hold_out=hold_out,
            vectors=vectors or {},
            named=named or {},
        )
