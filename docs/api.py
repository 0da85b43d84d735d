"""Write ``docs/api.md`` from the docstrings of the public names: ``make api``.

A name is public if it is in ``__all__`` of one of `MODULES`. Its docstring is Google's style and
has an example, whose names come from the imports at the head of the page.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["MODULES", "page"]

MODULES = {
    "torchrec_hilomoe": "What most users need.",
    "torchrec_hilomoe.hilomoe": "Everything about sites and routers.",
    "torchrec_hilomoe.data.schema": "What the columns of a data set are.",
    "torchrec_hilomoe.serving": "From a checkpoint to probabilities for raw rows.",
    "torchrec_hilomoe.hilomoe.reference": "The equations as plain loops, in any dtype.",
}
HEAD = """# API

Every public name, from its docstring (`make api` writes this page, a test compares it). The
examples run as they stand, one after the other, after these imports:

```pycon
>>> import torch
>>> from torch import nn
{imports}
```
"""
SILENT = (
    "forward",
    "extra_repr",
    "query_hook",
    "offsets_hook",
    "clear",
)  # of PyTorch, or called by hooks
# Names that a section's items stand for.
TITLES = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
    "Yields": "Yields",
    "Shape": "Shape",
    "Example": "",
}


def page() -> str:
    """The text of the page."""
    seen: set[int] = set()
    sections, imports = [], []
    for module_name, purpose in MODULES.items():
        module = import_module(module_name)
        parts = [f"## {module_name}", purpose]
        fresh = []
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.ismodule(found):
                parts.append(f"### {name}\n\nThe module [{found.__name__}](#{_anchor(found)}).")
            elif id(found) not in seen:
                seen.add(id(found))
                fresh.append(name)
                parts.append(_entry(name, found))
        sections.append("\n\n".join(parts))
        if fresh:
            names = "".join(f"...     {name},\n" for name in fresh)
            imports.append(f">>> from {module_name} import (\n{names}... )")
    return "\n\n".join([HEAD.format(imports="\n".join(imports)).rstrip(), *sections]) + "\n"


def _anchor(module: Any) -> str:
    return module.__name__.replace(".", "").lower()


def _entry(name: str, found: Any) -> str:
    text = inspect.getdoc(found) or ""
    parts = [f"### {name}"]
    if callable(found):
        parts.append(f"```text\n{_signature(name, found)}\n```")
    parts += [_shown(title, body) for title, body in _sections(text)]
    if inspect.isclass(found):
        parts.append(_methods(found))
    return "\n\n".join(part for part in parts if part)


def _methods(found: type) -> str:
    """What the class itself defines and documents for its users, a line each."""
    lines = []
    for name, member in vars(found).items():
        text = inspect.getdoc(member)
        if name.startswith("_") or name in SILENT or not text:
            continue
        first = _one_line(text.split("\n\n")[0])
        if isinstance(member, property):
            lines.append(f"- `.{name}`: {first}")
        elif inspect.isroutine(member) or isinstance(member, classmethod | staticmethod):
            lines.append(f"- `.{_signature(name, getattr(found, name))}`: {first}")
    return "Methods and properties:\n\n" + "\n".join(lines) if lines else ""


def _signature(name: str, found: Any) -> str:
    shown = []
    star = False
    for parameter in inspect.signature(found).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        default = parameter.default
        if default is parameter.empty or repr(default).startswith("<"):
            shown.append(parameter.name + ("" if default is parameter.empty else "=..."))
        else:
            shown.append(f"{parameter.name}={default!r}")
    return f"{name}({', '.join(shown)})"


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """The description, with an empty title, and each section of a docstring."""
    titles = "|".join(TITLES)
    parts = re.split(rf"^({titles}):\n", text, flags=re.MULTILINE)
    yield "", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _shown(title: str, body: str) -> str:
    if not body.strip():
        return ""
    if title == "Example":
        return f"```pycon\n{inspect.cleandoc(body)}\n```"
    if not title:
        return _markdown(body.strip())
    body = inspect.cleandoc(body)
    items = [item.removeprefix("- ") for item in re.split(r"\n(?=\S)", body)]
    if title in ("Returns", "Yields"):
        return f"{TITLES[title]}: {_one_line(body)}"
    lines = []
    for item in items:
        head, colon, rest = item.partition(":")
        named = f"`{head.strip('`')}`: {_one_line(rest)}"
        lines.append(f"- {named if colon else _one_line(item)}")
    return f"{TITLES[title]}:\n\n" + "\n".join(lines)


def _one_line(text: str) -> str:
    return _markdown(" ".join(text.split()))


def _markdown(text: str) -> str:
    """Docstrings' markup as Markdown's."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"\.\. math:: (.*)", r"    \1", text)
    return text.replace("``", "`")


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
