"""Two schemas compared, part by part, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["differences"]


def differences(mine: Any, other: Any, path: str = "") -> list[str]:
    """Say where two nested values differ; items with a name are compared by it.

    Args:
        mine: Mappings, lists and plain values, as ``dataclasses.asdict`` gives them.
        other: Likewise.
        path: Of both.

    Example:
        >>> differences({"tables": {"item": 5, "age": 2}}, {"tables": {"item": 6}})
        ["tables['age']: 2 here, absent there", "tables['item']: 5 here, 6 there"]
    """
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        found = []
        for key in sorted({*mine, *other}, key=str):
            at = f"{path}[{key!r}]" if path else key
            if key not in mine or key not in other:
                found.append(f"{at}: {_shown(mine, key)} here, {_shown(other, key)} there")
            else:
                found += differences(mine[key], other[key], at)
        return found
    if _is_named(mine) and _is_named(other):
        found = differences(_by_name(mine), _by_name(other), path)
        orders = [[item["name"] for item in items] for items in (mine, other)]
        if not found and orders[0] != orders[1]:
            found = [f"{path}: in the order {orders[0]} here, {orders[1]} there"]
        return found
    return [] if mine == other else [f"{path}: {mine!r} here, {other!r} there"]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _is_named(items: Any) -> bool:
    return (
        isinstance(items, Sequence)
        and not isinstance(items, str)
        and all(isinstance(item, Mapping) and "name" in item for item in items)
    )


def _by_name(items: Any) -> dict[str, Mapping[str, Any]]:
    return {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in items}
