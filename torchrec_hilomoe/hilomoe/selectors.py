"""Which of a model's maps are meant: by name, by the type of what holds them, or by a predicate."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["Selector", "matcher", "names_match", "shown"]

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def matcher(model: nn.Module, selector: Selector) -> Callable[[str, nn.Module], bool]:
    """Whether a selector means a map of the model, asked by qualified name and module.

    Args:
        model: Whose maps.
        selector: A shell pattern over names; a type, which means every map in modules of it, or
            that is of it; or a predicate, which is given name and module.

    Raises:
        ValueError: If it is none of these; when it is asked, if a predicate fails.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1)))
        >>> wide = matcher(model, lambda name, module: module.out_features > 1)
        >>> [name for name, m in model.named_modules() if type(m) is nn.Linear and wide(name, m)]
        ['0']
    """
    if isinstance(selector, str):
        return lambda name, module: names_match(name, selector)
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        modules = model.named_modules(remove_duplicate=False)
        holders = {name for name, module in modules if isinstance(module, selector)}
        return lambda name, module: not holders.isdisjoint(_above(name))
    if callable(selector) and not isinstance(selector, type | nn.Module):
        return lambda name, module: _answer(selector, name, module)
    raise ValueError(
        f"sites must be name patterns, types of modules or predicates of name and module, got "
        f"{selector!r}. Give a pattern such as '*head*'."
    )


def names_match(name: str, pattern: str) -> bool:
    """Whether a pattern means a name, in which brackets may stand, as in ``heads.a[0]``."""
    return name == pattern or fnmatchcase(name, pattern)


def _answer(predicate: Callable[[str, nn.Module], bool], name: str, module: nn.Module) -> bool:
    try:
        return bool(predicate(name, module))
    except Exception as error:
        raise ValueError(
            f"The predicate {shown(predicate)} fails at {name!r}, a {type(module).__name__}: "
            f"{type(error).__name__}: {error}. It is given name and module of each linear map, and "
            "must return True or False."
        ) from error


def shown(selector: Selector) -> str:
    """A selector for a message."""
    if isinstance(selector, str):
        return repr(selector)
    return getattr(selector, "__qualname__", None) or repr(selector)


def _above(name: str) -> Sequence[str]:
    """A module's own name, and those of all that hold it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
