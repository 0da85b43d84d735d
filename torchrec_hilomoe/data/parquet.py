"""``ParquetSource``: the row groups of a prepared folder's split, a few together as a block.

A prepared folder holds ``schema.json``, ``report.json``, a folder of ``*.parquet`` files for each
split, and ``_SUCCESS``, which is written last: without it the folder is half made.
"""

from array import array
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.errors import DataError, how_to_prepare
from torchrec_hilomoe.data.open_files import OpenFiles
from torchrec_hilomoe.data.schema import Schema, SCHEMA_FILE
from torchrec_hilomoe.data.source import BlockSource
from torchrec_hilomoe.runtime.paths import open_binary, path_manager

__all__ = [
    "SUCCESS_FILE",
    "ParquetSource",
    "check_columns",
    "check_folder",
    "column_faults",
    "count_rows",
    "is_list",
    "load_schema",
    "raw_values",
]

SUCCESS_FILE = "_SUCCESS"
BLOCK_BYTES = 4 << 20
# What pyarrow raises for files that are broken; the last for a broken column name.
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
AGAIN = "Copy the file again from a whole copy, or prepare the data again."
REMEDY = how_to_prepare()
DOES = {"valid": "validates", "test": "tests"}  # a run, by the rows of a split


class ParquetSource(BlockSource):
    """Reads the needed columns of a few row groups at a time, from any number of threads.

    Keeps a few open files, and of every block where it is and how many rows it has.

    Args:
        folder: A prepared folder, local or under a registered prefix.
        split: ``train``, ``valid`` or ``test``.
        schema: Which columns, and their meaning; by default the folder's own. It may leave
            columns out and cut histories further.
        block_bytes: Neighbouring row groups of a file are one block while they have no more than
            this, before decoding, in all columns: each block costs some time whatever its size.

    Raises:
        DataError: If something of the folder is missing, unreadable or unlike the schema.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        schema: Schema | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        folder = folder.rstrip("/") or "/"
        check_folder(folder)
        self._schema = schema or load_schema(folder)
        paths = _split_files(f"{folder}/{split}")
        self._files = [_File(path, self._schema, block_bytes) for path in paths]
        self._open_files = OpenFiles()
        # The number of the first block of each file.
        self._firsts = (0, *accumulate(len(file.block_rows) for file in self._files))
        self._block_rows = tuple(rows for file in self._files for rows in file.block_rows)
        if not sum(self._block_rows):
            raise DataError(f"{folder}/{split} has no rows{_remedy_of_empty(split)}")

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self._schema

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each block, file by file."""
        return self._block_rows

    def describe(self, block: int) -> str:
        """Name the file and the row groups."""
        index = self._file_of(block)
        file = self._files[index]
        first, *rest = file.groups(block - self._firsts[index])
        return f"{file.path} row group{f's {first} to {rest[-1]}' if rest else f' {first}'}"

    def read(self, epoch: int, block: int) -> pa.Table:
        """Return the needed columns of a block; every epoch has the same."""
        index = self._file_of(block)
        try:
            table = self._files[index].read(block - self._firsts[index], self._open_files)
        except UNREADABLE as error:
            raise DataError(
                f"{self.describe(block)} cannot be read ({_one_line(error)}). {AGAIN}"
            ) from error
        if table.num_rows != self._block_rows[block]:
            raise DataError(
                f"{self.describe(block)} has {table.num_rows} rows, the file's footer says "
                f"{self._block_rows[block]}. {AGAIN}"
            )
        return table

    def _file_of(self, block: int) -> int:
        return bisect_right(self._firsts, block) - 1


def _remedy_of_empty(split: str) -> str:
    if split not in DOES:
        return f". {REMEDY}"
    return (
        f", and a run {DOES[split]} by some. Prepare again with a "
        f"--{split}_percent above 0, or with files of that split."
    )


def check_folder(folder: str, dataset: str | None = None) -> None:
    """Refuse a folder that is missing or that ``prepare`` has not finished.

    Args:
        folder: Local, or under a registered prefix.
        dataset: What it should hold, if that is known.

    Raises:
        DataError: Naming what is missing, and how to make it.
    """
    remedy = how_to_prepare(dataset)
    if not path_manager.isdir(folder):
        raise DataError(f"there is no data folder {folder}. {remedy}")
    for name in (SCHEMA_FILE, SUCCESS_FILE):
        if not path_manager.isfile(f"{folder}/{name}"):
            raise DataError(f"{folder} is not a whole data folder: {name} is missing. {remedy}")


def load_schema(folder: str) -> Schema:
    """Read a prepared folder's schema.

    Raises:
        DataError: If its file is not a schema of this version.
    """
    path = f"{folder}/{SCHEMA_FILE}"
    try:
        return Schema.load(path)
    except ValueError as error:
        raise DataError(f"{path} is not a schema ({_one_line(error)}). {REMEDY}") from error


def count_rows(folder: str, split: str) -> int:
    """Return how many rows the files of a split have, by their footers.

    Raises:
        DataError: If there is no file, or one is not whole.
    """
    return sum(_footer(path)[0].num_rows for path in _split_files(f"{folder}/{split}"))


def raw_values(folder: str, schema: Schema, feature: str) -> dict[int, str]:
    """Return what a feature's ids stand for, where the vocabulary lies beside the schema.

    Args:
        folder: A prepared folder.
        schema: Its schema.
        feature: A column of ids.

    Returns:
        Raw values by id; none if the ids were hashed or were ids from the start. ``(none)`` and
        ``(unknown)`` are no values; where one is called so, they are in more parentheses.
    """
    tables = {field.name: field.table for field in schema.id_features}
    rule = schema.vocabularies.get(tables.get(feature, ""))
    if rule is None or rule.file is None or not path_manager.isfile(f"{folder}/{rule.file}"):
        return {}
    with open_binary(f"{folder}/{rule.file}", "rb") as source:
        found = pq.read_table(source)
    values = dict(zip(found["id"].to_pylist(), map(str, found["value"].to_pylist()), strict=True))
    taken = set(values.values())
    special = {0: "(none)", schema.unknown_id(tables[feature]): "(unknown)"}
    for id_, name in special.items():
        while name in taken:
            name = f"({name})"
        special[id_] = name
    return {**values, **special}


def _split_files(folder: str) -> list[str]:
    if not path_manager.isdir(folder):
        split = PurePosixPath(folder).name
        raise DataError(f"there is no folder {folder}, so no {split} rows. {REMEDY}")
    names = sorted(name for name in path_manager.ls(folder) if name.endswith(".parquet"))
    if not names:
        raise DataError(f"{folder} has no .parquet file. {REMEDY}")
    return [f"{folder}/{name}" for name in names]


def _footer(path: str) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with open_binary(path) as source, pq.ParquetFile(source) as file:
            return file.metadata, file.schema_arrow
    except UNREADABLE as error:
        raise DataError(
            f"{path} is not a whole Parquet file ({_one_line(error)}). {AGAIN}"
        ) from error


class _File:
    """One Parquet file: what its footer says of blocks, and reading by blocks.

    Attributes:
        path: Where it is.
        block_rows: Rows of each block.
    """

    def __init__(self, path: str, schema: Schema, block_bytes: int) -> None:
        self.path = path
        self._columns = list(schema.columns)
        footer, columns = _footer(path)
        check_columns(columns, schema, path)
        groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
        begins = _begins([group.total_byte_size for group in groups], block_bytes)
        rows = [group.num_rows for group in groups]
        self.block_rows = tuple(sum(rows[start:stop]) for start, stop in pairwise(begins))
        # The first row group of each block, and the number of row groups.
        self._begins = array("i", begins)
        if sum(self.block_rows) != footer.num_rows:
            raise DataError(
                f"{path} has a footer that says {footer.num_rows} rows in all and "
                f"{sum(self.block_rows)} in its row groups. {AGAIN}"
            )

    def groups(self, block: int) -> range:
        """Return the row groups of a block."""
        return range(self._begins[block], self._begins[block + 1])

    def read(self, block: int, files: OpenFiles) -> pa.Table:
        """Return the needed columns of a block."""
        # On this thread alone: Arrow's own threads are as many as OMP_NUM_THREADS, which launchers
        # set to 1, so workers that shared them would wait for each other.
        with files.lend(self.path) as file:
            return file.read_row_groups(
                self.groups(block), columns=self._columns, use_threads=False
            )


def _begins(sizes: list[int], most: int) -> list[int]:
    """Cut ``sizes`` into runs of at most ``most`` in all, or of one: their begins, and the end.

    Example:
        >>> _begins([3, 4, 9, 1], most=8)
        [0, 2, 3, 4]
    """
    begins: list[int] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not begins or filled + size > most:
            begins.append(index)
            filled = 0
        filled += size
    return [*begins, len(sizes)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_columns(columns: pa.Schema, schema: Schema, where: str) -> None:
    """Refuse columns that are missing or whose type cannot hold what the schema says.

    Args:
        columns: The Arrow schema of a file.
        schema: What is wanted.
        where: The file, for the message.

    Raises:
        DataError: Naming every fault.
    """
    if faults := column_faults(columns, schema):
        raise DataError(
            f"{where}: {'; '.join(faults)}. Prepare the data again, or correct its schema.json."
        )


def column_faults(columns: pa.Schema, schema: Schema) -> list[str]:
    """Say which columns are missing or of a type that cannot hold what the schema says.

    Args:
        columns: The Arrow schema of some rows.
        schema: What is wanted.
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
    return faults


def is_list(stored: pa.DataType) -> bool:
    """Say whether a column of this type has many entries a row."""
    return pa.types.is_list(stored) or pa.types.is_large_list(stored)


def _is_id(stored: pa.DataType) -> bool:
    return pa.types.is_integer(stored)


def _is_number(stored: pa.DataType) -> bool:
    floating = pa.types.is_floating(stored)
    return floating or pa.types.is_integer(stored) or pa.types.is_boolean(stored)
