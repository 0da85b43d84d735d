"""The name of a module that somebody gives, refused where the model has none of it."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["check_module"]

SHOWN = 20


def check_module(who: str, name: str, modules: Iterable[str]) -> None:
    """Refuse a name that no module has, or the empty one, which is the model's own.

    Args:
        who: The option, for the message.
        name: What was given.
        modules: Qualified names of the model's modules.

    Raises:
        ValueError: Naming the nearest, or what there is.

    Example:
        >>> try:
        ...     check_module("inject: query_module", "featurs", ["", "features", "head.0"])
        ... except ValueError as error:
        ...     print(error)
        inject: query_module 'featurs' is no module of the model. Did you mean 'features'?
    """
    known = [module for module in modules if module]
    if name in known:
        return
    near = get_close_matches(str(name), known, n=3)
    # A name without the prefix that a wrapper or a task puts before it.
    near = near or [it for it in known if name and it.endswith(f".{name}")][:3]
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    else:
        more = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        hint = f"It has: {', '.join(known[:SHOWN])}{more}."
    raise ValueError(f"{who} {name!r} is no module of the model. {hint}")
