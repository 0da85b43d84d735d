"""The names of a configuration's options, and which one a mistyped name was meant to be."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["did_you_mean", "option_names", "unknown_keys"]


def option_names(config: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every option and group of options of a dataclass tree."""
    hints = get_type_hints(config)
    for field in fields(config):
        yield f"{prefix}{field.name}"
        for group in _groups_in(hints[field.name]):
            yield from option_names(group, f"{prefix}{field.name}.")


def unknown_keys(config: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of nested ``values`` that is no option of ``config``."""
    hints = get_type_hints(config)
    known = {field.name for field in fields(config)}
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
            continue
        for group in _groups_in(hints[key]):
            for inner in _groups_of(value, hints[key]):
                if isinstance(inner, Mapping):
                    yield from unknown_keys(group, inner, f"{prefix}{key}.")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question that names the nearest of ``names``, or where to find them all."""
    near = get_close_matches(name, list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else "See --help for all of them."


def _groups_of(value: Any, hint: Any) -> Iterable[Any]:
    """Return what may be groups of options in a value: of a list or of a mapping, its entries."""
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping) and _maps(hint):
        return value.values()
    return [value]


def _maps(hint: Any) -> bool:
    """Whether a type is, or may be, a mapping from names of the user's own."""
    return get_origin(hint) in (Mapping, dict) or any(map(_maps, get_args(hint)))


def _groups_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses in a type, such as ``Stage`` in ``tuple[Stage, ...] | None``."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _groups_in(part)
