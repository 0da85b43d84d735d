"""Text files, a record a line, in pieces of whole lines that are taken apart in threads."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from torchrec_hilomoe.data.errors import DataError
from torchrec_hilomoe.data.prepare.arrow import call
from torchrec_hilomoe.data.prepare.raw import Piece, RawFile
from torchrec_hilomoe.runtime.paths import open_binary

__all__ = ["LINE", "LineFile", "unzipped"]

LINE = "line"  # the column of whole lines, beside those of a record's fields
BLOCK_BYTES = 1 << 22


class LineFile(RawFile):
    """Lines of text that a pattern takes apart.

    The columns are the pattern's groups, strings, and ``LINE``; where the pattern does not match,
    the groups are null.

    Args:
        path: Plain, or gzipped if it ends in ``.gz``.
        pattern: A regular expression with named groups that a whole good line matches.
        encoding: Of the file.
    """

    def __init__(self, path: str, pattern: str, *, encoding: str) -> None:
        self.path = path
        self._encoding = encoding
        self._whole = pc.ExtractRegexOptions(f"^(?:{pattern})$")

    def columns(self) -> pa.Schema:
        """Return the groups' names and that of the line."""
        return _taken_apart(b"", self._encoding, self._whole).schema

    def pieces(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield blocks of lines; they are taken apart when they are loaded, in whichever thread."""
        first = 0
        for number, block in enumerate(_blocks(self.path)):

            def load(block: bytes = block) -> pa.Table:
                try:
                    return _taken_apart(block, self._encoding, self._whole).select(list(columns))
                except UnicodeDecodeError as error:
                    raise _unreadable(self.path, error) from error

            yield Piece(
                path=self.path,
                number=number,
                first=first,
                load=load,
                place=lambda row: f"line {row + 1}",
            )
            first += block.count(b"\n") + (not block.endswith(b"\n"))


def unzipped(path: str, raw: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """Return the content of an open file, decompressed if its name ends in ``.gz``."""
    return gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw


def _blocks(path: str) -> Iterator[bytes]:
    """Yield a file cut after ends of lines."""
    rest = b""
    try:
        with open_binary(path) as raw, unzipped(path, raw) as content:
            while block := content.read(BLOCK_BYTES):
                whole, newline, after = (rest + block).rpartition(b"\n")
                rest = after
                if newline:
                    yield whole + newline
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if rest:
        yield rest


def _taken_apart(block: bytes, encoding: str, whole: pc.ExtractRegexOptions) -> pa.Table:
    text = pa.array([block.decode(encoding)], pa.large_string())
    lines = call("split_pattern", text, options=pc.SplitPatternOptions("\n")).flatten()
    # What follows the last end of a line is no line.
    lines = lines.slice(0, len(lines) - (not block or block.endswith(b"\n")))
    lines = call("utf8_rtrim", lines, options=pc.TrimOptions("\r"))
    fields = call("extract_regex", lines, options=whole)
    named = dict(zip(fields.type.names, fields.flatten(), strict=True))
    return pa.table({**named, LINE: lines})


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error}). Download it again.")
