"""The options of a run: their names, the names that they had, and their help.

All of it is read off the configuration's dataclasses and their docstrings. ``python -m
torchrec_hilomoe.options`` prints what is in ``docs/config.md``.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass, MISSING
from difflib import get_close_matches
from textwrap import wrap
from types import MappingProxyType, NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints, Literal, Union

import yaml

from torchrec_hilomoe.config import RunConfig

__all__ = [
    "Option",
    "describe_options",
    "did_you_mean",
    "help_text",
    "markdown",
    "old_options",
    "option_names",
    "renew_options",
    "unknown_keys",
]

# By group, the names of the last release. They are told for one release and then forgotten.
RENAMED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "data": {"lanes": "num_canonical_shards", "world": "synthetic"},
        "model.bst": {"positions": "position_dim"},
        "train": {
            "accumulate": "gradient_accumulation_steps",
            "clip_norm": "max_grad_norm",
            "decay_every": "decay.every",
            "decay_factor": "decay.factor",
            "decay_floor": "decay.floor",
            "expert_rate": "expert_lr_scale",
        },
        "train.stages": {
            "decay_every": "decay.every",
            "decay_factor": "decay.factor",
            "decay_floor": "decay.floor",
            "expert_rate": "expert_lr_scale",
            "rate": "lr_scale",
        },
    }
)
NEW_NAMES = {
    f"{group}.{old}": f"{group}.{new}" for group in RENAMED for old, new in RENAMED[group].items()
}
KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
WIDTH, INDENT = 100, 6 * " "  # of a line of help


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a run, or a group of options.

    Attributes:
        name: Dotted name; ``[]`` is an entry of a list, ``NAME`` a key of a mapping.
        kind: Values that it may have, as text; empty for a group that is always there.
        default: Default value, as YAML; None if it has none.
        help: Meaning, as its dataclass documents it.
    """

    name: str
    kind: str
    default: str | None
    help: str


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
    """Name the option that ``name`` is now, or ask for the nearest, or say where to find all."""
    if name in NEW_NAMES:
        return f"It is {NEW_NAMES[name]!r} now."
    leaf = name.rpartition(".")[2]
    if moved := [old for old in NEW_NAMES if old.rpartition(".")[2] == leaf]:
        return f"It was {moved[0]!r}, which is {NEW_NAMES[moved[0]]!r} now."
    near = get_close_matches(name, list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else "See --help for all of them."


def old_options(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was an option in the last release and is a group now, with what it holds."""
    for group in ("train", "train.stages"):
        for entry in _entries(values, group):
            if isinstance(kind := entry.get("decay"), str):
                yield f"{group}.decay is a group of options now; {kind!r} is {group}.decay.kind."


def renew_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that a run of the last release has saved, in the names of today.

    Example:
        >>> renew_options({"train": {"decay": "step", "decay_every": 9, "clip_norm": 10.0}})
        {'train': {'decay': {'kind': 'step', 'every': 9}, 'max_grad_norm': 10.0}}
    """
    for group, renamed in RENAMED.items():
        for entry in _entries(values, group):
            if isinstance(entry.get("decay"), str):
                entry["decay"] = {"kind": entry["decay"]}
            for old in renamed.keys() & entry.keys():
                value = entry.pop(old)
                into, _, name = renamed[old].rpartition(".")
                if old == "positions":
                    value = None if value else 0
                if not into:
                    entry[name] = value
                elif isinstance(
                    entry.get(into), dict
                ):  # a stage without a decay has no factor of it
                    entry[into][name] = value
    return values


def _entries(values: Mapping[str, Any], group: str) -> Iterator[MutableMapping[str, Any]]:
    """Yield the mappings at a dotted place; of a list, its entries."""
    found: Any = values
    for name in group.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    yield from (e for e in (found if isinstance(found, list) else [found]) if isinstance(e, dict))


def describe_options(config: type, prefix: str = "", start: Any = None) -> Iterator[Option]:
    """Yield every option of a dataclass tree, groups before what is in them.

    Args:
        config: The tree.
        prefix: Its own dotted name.
        start: An instance, which has the defaults; None takes those of the fields.
    """
    hints = get_type_hints(config)
    texts = _attribute_texts(config)
    for field in fields(config):
        hint = hints[field.name]
        default = field.default if start is None else getattr(start, field.name)
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        always = is_dataclass(hint)
        name = f"{prefix}{field.name}"
        yield Option(
            name=name,
            kind="" if always else _kind(hint),
            default=None if always or default is MISSING else _as_yaml(default),
            help=texts[field.name].replace("``", "`"),
        )
        for group in _groups_in(hint):
            inner = f"{name}{'[]' if _lists(hint) else '.NAME' if _maps(hint) else ''}."
            yield from describe_options(group, inner, default if always else None)


def help_text(topic: str = "") -> str:
    """Return the help of every option, or of those whose names begin with ``topic``.

    Raises:
        ValueError: If there is none, naming the nearest.
    """
    found = [o for o in describe_options(RunConfig) if _is_about(o.name, topic)]
    if not found:
        names = option_names(RunConfig)
        raise ValueError(f"--help: there is no option {topic!r}. {did_you_mean(topic, names)}")
    lines = []
    for option in found:
        flag = option.name if re.search(r"\[\]|\.NAME", option.name) else f"--{option.name}"
        default = "" if option.default is None else f" (default: {option.default})"
        if option.kind:
            lines.append(f"{flag}  {option.kind}{default}")
            lines += wrap(option.help, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        else:
            lines += ["", f"{option.name}: {option.help}"]
    return "\n".join(lines).strip("\n")


def markdown() -> str:
    """Return the help of every option as a document."""
    lines = [
        "# Options of a run",
        "",
        "`python -m torchrec_hilomoe train --help` prints the same, and with the name of an option",
        "or of a group behind it, such as `train.decay`, a part. On the command line an option is",
        "`--NAME VALUE`; in YAML its dots are nesting. `[]` stands for an entry of a list, `NAME`",
        "for a key of the user's own.",
        "",
        "This page is the output of `python -m torchrec_hilomoe.options`.",
    ]
    sections: dict[str, list[str]] = {"": ["", "## The run", ""]}
    for option in describe_options(RunConfig):
        if not option.kind:
            sections[f"{option.name}."] = ["", f"## {option.name}", "", option.help, ""]
    for section in sections.values():
        section += ["| option | value | default | meaning |", "|---|---|---|---|"]
    for option in describe_options(RunConfig):
        if option.kind:
            nearest = max(filter(option.name.startswith, sections), key=len)
            default = "" if option.default is None else f"`{option.default}`"
            row = f"| `{option.name}` | {option.kind} | {default} | {option.help} |"
            sections[nearest].append(row)
    return "\n".join([*lines, *(line for section in sections.values() for line in section), ""])


def _is_about(name: str, topic: str) -> bool:
    plain = re.sub(r"\[\]|\.NAME", "", name)
    return not topic or plain == topic or plain.startswith(f"{topic}.")


def _attribute_texts(config: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and of its bases say of each attribute."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        document = inspect.cleandoc(base.__doc__ or "")
        block = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", document, re.MULTILINE)
        for entry in re.split(r"^    (?=\w)", block[1] if block else "", flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(":")
            texts[name] = " ".join(text.split())
    return texts


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.strip().removesuffix("...").strip()


def _kind(hint: Any) -> str:
    """Say in words what values a type has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        *others, last = (_kind(part).replace(" or ", ", ") for part in arguments)
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        *others, last = arguments
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        first, *rest = _kind(arguments[0]).split(" ")
        return " ".join(["list of", first.removesuffix("s") + "s", *rest])
    if _maps(hint):
        return f"mapping of names to {_kind(arguments[1])}"
    return KINDS.get(hint, "options")


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


def _lists(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(map(_lists, get_args(hint)))


def _groups_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses in a type, such as ``Stage`` in ``tuple[Stage, ...] | None``."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _groups_in(part)


if __name__ == "__main__":
    sys.stdout.write(markdown())
