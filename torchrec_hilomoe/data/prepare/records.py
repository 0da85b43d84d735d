"""Raw files are found, and bad records counted."""

import json
import logging
import zlib
from collections import Counter
from typing import Any

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.sources import unzipped
from torchrec_hilomoe.runtime.paths import open_binary, path_manager

__all__ = ["BadRecords", "find_raw", "read_json"]

logger = logging.getLogger(__name__)

REPORTED_BAD_LINES = 3  # of each file; the rest are counted
SHOWN_CHARACTERS = 120
ENOUGH_TO_JUDGE = 5


class BadRecords:
    """Counts malformed records, over all raw files of a data set.

    Args:
        limit: More than these are fatal.

    Attributes:
        counts: Those of each file, by its name without ``.gz``.
    """

    def __init__(self, limit: int) -> None:
        self.counts: Counter[str] = Counter()
        self._limit = limit

    def add(self, path: str, unit: str, place: int, text: str) -> None:
        """Report one.

        Args:
            path: The file.
            unit: What ``place`` counts, such as ``line``.
            place: Where in the file.
            text: What is there.

        Raises:
            DataError: If it is one too many.
        """
        name = path.rpartition("/")[2].removesuffix(".gz")
        self.counts[name] += 1
        what = f"{path} {unit} {place}: malformed: {text[:SHOWN_CHARACTERS]!r}"
        if self.counts[name] <= REPORTED_BAD_LINES:
            logger.warning("%s; skipped", what)
        if self.counts.total() > self._limit:
            raise DataError(
                f"more than max_bad_rows {self._limit} malformed records; the last is {what}. "
                f"{self._remedy(self.counts[name], unit, place)}"
            )

    @staticmethod
    def _remedy(bad: int, unit: str, place: int) -> str:
        if bad < ENOUGH_TO_JUDGE or 2 * bad <= place + 1:
            return "Repair the raw files, or raise --max_bad_rows."
        # Most records are bad: any limit would be met.
        return (
            f"{bad} of the first {place + 1} {unit}s are, so the file is not what is expected, or "
            "is described wrongly."
        )


def find_raw(folder: str, name: str, source: str) -> str:
    """Return the path of a raw file, plain or gzipped.

    Args:
        folder: Where the user says that the raw files are.
        name: Of the plain file.
        source: Where to get it, for the message.

    Raises:
        DataError: If neither is there.
    """
    if not path_manager.isdir(folder):
        raise DataError(f"there is no folder {folder}. {source}")
    for path in (f"{folder.rstrip('/')}/{name}", f"{folder.rstrip('/')}/{name}.gz"):
        if path_manager.isfile(path):
            return path
    raise DataError(f"{folder} has neither {name} nor {name}.gz. {source}")


def read_json(path: str) -> Any:
    """Read a whole JSON file, plain or gzipped.

    Raises:
        DataError: If it is unreadable or no JSON.
    """
    try:
        with open_binary(path) as raw, unzipped(path, raw) as binary:
            return json.loads(binary.read())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Download it again.") from error
