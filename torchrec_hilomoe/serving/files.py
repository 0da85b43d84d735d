"""Files of rows are scored in order, a piece at a time, into files of the same names."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_hilomoe.runtime.paths import sync_folder
from torchrec_hilomoe.serving.requests import Values
from torchrec_hilomoe.serving.scorer import Scorer

__all__ = ["score_files"]

ROWS_AT_ONCE = 8192
PROBABILITY = "probability"

logger = logging.getLogger(__name__)


def score_files(
    scorer: Scorer, data: Sequence[str], out: str, *, values: Values = "raw"
) -> dict[str, int]:
    """Score Parquet files into a folder.

    A file is written beside its place and renamed; one that is there already, with as many rows as
    its source, is left, so that who was interrupted goes on with the next.

    Args:
        scorer: The model.
        data: Files, and folders of them.
        out: A folder; each file's probabilities are in a file of its name, rows in its order.
        values: As in :meth:`Scorer.score`.

    Returns:
        The number of rows of each file that was written, by its path.

    Raises:
        ValueError: If a file is missing, is no Parquet, lacks a column, has a name that another has
            as well, or a row that cannot be scored; it and the file are named.
    """
    files = list(_files(data))
    names = [os.path.basename(file) for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two files of --data are called {name}, and would be one in --out {out}; score "
                "their folders one by one."
            )
    os.makedirs(out, exist_ok=True)
    written = {}
    for file, name in zip(files, names, strict=True):
        target = os.path.join(out, name)
        rows = _rows(file)
        if os.path.exists(target) and os.path.samefile(target, file):
            raise ValueError(f"--out {out} is the folder of {file}; name another.")
        if os.path.exists(target) and _rows(target) == rows:
            logger.info("%s is there already, with %d rows", target, rows)
            continue
        _score_file(scorer, file, target, rows, values)
        written[target] = rows
    return written


def _score_file(scorer: Scorer, file: str, target: str, rows: int, values: Values) -> None:
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{name}.partial")
    kind = pa.schema([(PROBABILITY, pa.float32())])
    first = 0
    try:
        with (
            pq.ParquetFile(file) as source,
            pq.ParquetWriter(partial, kind) as sink,
            tqdm(total=rows, desc=name, unit=" rows", unit_scale=True, disable=None) as bar,
        ):
            wanted = [it for it in scorer.columns if it in source.schema_arrow.names]
            for batch in source.iter_batches(ROWS_AT_ONCE, columns=wanted):
                table = pa.Table.from_batches([batch])
                where = f"{file}, rows from {first}"
                found = scorer.score(table, values=values, where=where)
                sink.write_table(pa.table({PROBABILITY: found}, schema=kind))
                first += table.num_rows
                bar.update(table.num_rows)
        os.replace(partial, target)
        sync_folder(folder or ".")
    except pa.ArrowException as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}).") from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def _files(data: Sequence[str]) -> Iterator[str]:
    for path in data:
        if os.path.isdir(path):
            found = sorted(it for it in os.listdir(path) if it.endswith(".parquet"))
            if not found:
                raise ValueError(f"--data {path} has no .parquet file. Name files or their folder.")
            yield from (os.path.join(path, name) for name in found)
        elif os.path.isfile(path):
            yield path
        else:
            raise ValueError(f"--data {path} is not there. Name Parquet files or their folder.")


def _rows(file: str) -> int:
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no Parquet file ({reason}). Name another.") from error
