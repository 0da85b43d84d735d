"""Files that a run, or a person, wrote and that are later believed: read, or refused in one line.

A kill, a full disk, another program or a person may have left anything in them. Each is a plain
file of UTF-8 whose text is JSON or YAML of a mapping, nested not too deeply, of finite numbers and
of the types that are wanted; whatever else it is, is said.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, MISSING
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, Literal, TypeVar, Union

import yaml

from torchrec_hilomoe.runtime.paths import open_binary

__all__ = [
    "DocumentError",
    "build",
    "check_plain",
    "misfit",
    "misfit_of_parts",
    "parse_json",
    "parse_yaml",
    "read_lines",
    "read_text",
]

DEEPEST = 50  # nested mappings and lists
MOST_VALUES = 1_000_000  # aliases of YAML make as many of a few bytes
MOST_INTEGER = 2**63
SHOWN = 40  # characters of a value in a message
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
T = TypeVar("T")


class DocumentError(ValueError):
    """A file does not hold what it must; the message names it and says what was found."""


def read_text(path: str | os.PathLike[str], *, errors: str = "strict") -> str:
    """Read a text file, local or remote.

    Args:
        path: The file.
        errors: What is done about bytes that are not UTF-8, as ``bytes.decode`` takes it.

    Raises:
        OSError: If it is missing or cannot be read.
        DocumentError: If it is no plain file, or not UTF-8.
    """
    path = os.fspath(path)
    check_plain(path)
    with open_binary(path) as source:
        raw = source.read()
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is no text: byte {error.start} is not UTF-8") from error


def check_plain(path: str) -> None:
    """Refuse what is there and is no plain file: to open a FIFO waits for somebody who writes.

    Raises:
        DocumentError: Naming what it is.
    """
    if "://" not in path and os.path.exists(path):
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
        if kind is not None:
            raise DocumentError(f"{path} is {kind}, and must be a plain file")


def parse_json(text: str, where: object) -> dict[str, Any]:
    """Parse strict JSON of a mapping.

    Args:
        text: What was read.
        where: The file, for the message.

    Raises:
        DocumentError: If it is anything else.

    Example:
        >>> parse_json('{"rows": 3}', "summary.json")
        {'rows': 3}
        >>> try:
        ...     parse_json('{"auc": NaN}', "summary.json")
        ... except DocumentError as error:
        ...     print(error)
        summary.json is not JSON: it holds NaN, which is no number
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise DocumentError(_unparsed(text, where, "JSON", str(error))) from error
    return _checked(value, where)


def parse_yaml(text: str, where: object) -> dict[str, Any]:
    """Parse YAML of a mapping; raises as `parse_json` does."""
    try:
        value = yaml.safe_load(text)
    except RecursionError as error:
        raise _too_deep(where) from error
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(_unparsed(text, where, "YAML", str(error))) from error
    return _checked(value, where)


def read_lines(
    path: str | os.PathLike[str], types: Mapping[str, Any], others: Any = Any
) -> list[dict[str, Any]]:
    """Read a file with a mapping in JSON on each line, as a run logs them.

    A last line without an end is left out: the run may be writing it.

    Args:
        path: The file, which may be missing.
        types: Type of each value that a line must have.
        others: Type of the other values of a line.

    Raises:
        DocumentError: Naming the line that is none.
    """
    if not os.path.lexists(path):
        return []
    rows = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        if line[-1] == "\n":
            where = f"{os.fspath(path)}, line {number},"
            row = parse_json(line, where)
            if problem := misfit_of_parts(row, {**dict.fromkeys(row, others), **types}, types):
                raise DocumentError(f"{where} is damaged: {problem}")
            rows.append(row)
    return rows


def build(kind: type[T], raw: Any) -> T:
    """Make a dataclass of plain numbers and texts from a mapping of JSON.

    Raises:
        DocumentError: If a value is missing, unknown, or of another type.

    Example:
        >>> from torchrec_hilomoe.data.batch import LoaderState
        >>> build(LoaderState, {"epoch": 1, "lane_rows": 0, "num_canonical_shards": 8}).epoch
        1
    """
    if problem := misfit(raw, kind):
        raise DocumentError(problem)
    return kind(**raw)


def misfit(value: Any, hint: Any, name: str = "") -> str:
    """Say in which way a value of JSON or YAML is not of a type; empty if it is.

    Args:
        value: A value; of a dataclass, its mapping or itself.
        hint: The type.
        name: Of the value, for the message.

    Example:
        >>> misfit({"a": [1, "x"]}, Mapping[str, tuple[int, ...]])
        "a[1] is 'x', and must be a whole number"
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any or (isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint)):
        return ""
    if origin in (Union, UnionType):
        problems = [misfit(value, part, name) for part in inner if part is not type(None)]
        return "" if "" in problems or (value is None and type(None) in inner) else problems[0]
    if origin is Literal:
        wanted = f"one of {', '.join(map(str, inner))}"
        return "" if value in inner else _told(value, wanted, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _told(value, "a list", name)
        return _first(misfit(it, inner[0], f"{name}[{at}]") for at, it in enumerate(value))
    if is_dataclass(origin) or origin is Mapping:
        if not isinstance(value, Mapping):
            return _told(value, "a mapping of names to values", name)
        if origin is Mapping:
            return misfit_of_parts(value, dict.fromkeys(value, (inner or (str, Any))[1]), name=name)
        assert is_dataclass(origin)
        hints = get_type_hints(origin)
        if unknown := [it for it in value if it not in hints]:
            return f"{_path(name, unknown[0])} is unknown"
        needed = [it.name for it in fields(origin) if it.default is it.default_factory is MISSING]
        return misfit_of_parts(value, hints, needed, name)
    if hint in (int, float):
        limit = MOST_INTEGER if type(value) is int else math.inf
        fits = type(value) in (int, hint) and abs(value) < limit
        return "" if fits else _told(value, "a whole number" if hint is int else "a number", name)
    wanted = {str: "text", bool: "true or false"}.get(hint, str(hint))
    return "" if isinstance(value, hint) else _told(value, wanted, name)


def misfit_of_parts(
    value: Mapping[str, Any], hints: Mapping[str, Any], needed: Iterable[str] = (), name: str = ""
) -> str:
    """Say the same of a mapping's values, each of which has a type."""
    missing = [it for it in needed if it not in value]
    if missing:
        return f"{_path(name, missing[0])} is missing"
    return _first(misfit(value[it], hints[it], _path(name, it)) for it in hints if it in value)


def _first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _path(name: str, part: object) -> str:
    return f"{name}.{part}" if name else str(part)


def _told(value: Any, wanted: str, name: str) -> str:
    return f"{name or 'it'} is {_shown(value)}, and must be {wanted}"


def _shown(value: Any) -> str:
    """A value in a few characters, of one line."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def _unparsed(text: str, where: object, syntax: str, problem: str) -> str:
    if not text.strip():
        return f"{where} is empty"
    return f"{where} is not {syntax}: {' '.join(problem.split())}"


def _checked(value: Any, where: object) -> dict[str, Any]:
    if value is None:
        raise DocumentError(f"{where} is empty")
    if not isinstance(value, dict):
        raise DocumentError(f"{where} is {_shown(value)}, and must be a mapping of names to values")
    if _count(value, DEEPEST, {}, where) > MOST_VALUES:
        raise DocumentError(f"{where} has more than {MOST_VALUES:,} values")
    return value


def _count(value: Any, deeper: int, known: dict[int, int], where: object) -> int:
    """Count the values in one; what aliases repeat is counted as often as it is meant."""
    if not isinstance(value, dict | list):
        return 1
    if not deeper:
        raise _too_deep(where)
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(it, deeper - 1, known, where) for it in inner)
    return known[id(value)]


def _too_deep(where: object) -> DocumentError:
    return DocumentError(f"{where} is nested more than {DEEPEST} deep")
