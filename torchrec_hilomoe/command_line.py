"""The command line of a run: a recipe, dotted overrides, and help for what is mistyped."""

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from torchrec_hilomoe.config import RunConfig

__all__ = ["DEFAULT_RECIPE", "ParsedRun", "UsageError", "parse_run", "recipe_names"]

DEFAULT_RECIPE = "bst-synthetic"


class UsageError(ValueError):
    """The command line or a recipe is wrong; the message says what would be right."""


@dataclass(frozen=True, kw_only=True)
class ParsedRun:
    """A command line, resolved.

    Attributes:
        config: The whole run.
        resolved: The same as YAML, which ``--config`` takes back.
        recipe: Name of the recipe or of the file that it came from.
    """

    config: RunConfig
    resolved: str
    recipe: str


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that are shipped."""
    folder = files("torchrec_hilomoe") / "recipes"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def parse_run(argv: Sequence[str]) -> ParsedRun:
    """Read a recipe and its overrides.

    Args:
        argv: Arguments without the program's name.

    Raises:
        UsageError: For an unknown flag, key, recipe or value.
    """
    parser = ArgumentParser(
        prog="train.py",
        description="Train a CTR model. Without arguments: the recipe bst-synthetic.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"a YAML file, or the name of a recipe: {', '.join(recipe_names())}",
    )
    parser.add_class_arguments(RunConfig)
    arguments, recipe = _with_recipe_path(_spell_out_switches(argv))
    try:
        parsed = parser.parse_args(arguments)
        config = _run_config(parser.instantiate(parsed))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise UsageError(_explain(error, parser)) from error
    return ParsedRun(
        config=config, resolved=parser.dump(parsed.clone(), skip_unset=False), recipe=recipe
    )


def _run_config(instantiated: Namespace) -> RunConfig:
    values: dict[str, Any] = vars(instantiated)
    return RunConfig(**{field.name: values[field.name] for field in fields(RunConfig)})


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """Turn a bare ``--dry_run`` into ``--dry_run true``, which is how the parser reads switches."""
    spelled = []
    for argument, following in zip(argv, [*argv, "--"][1:], strict=True):
        spelled.append(argument)
        if argument == "--dry_run" and following.startswith("--"):
            spelled.append("true")
    return spelled


def _with_recipe_path(argv: Sequence[str]) -> tuple[list[str], str]:
    """Put the recipe first, by path, so that overrides win wherever they stand."""
    rest, name = [], DEFAULT_RECIPE
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            name = next(arguments, "")
        elif argument.startswith("--config="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return ["--config", name, *rest], name.rpartition("/")[2].rpartition(".")[0]
    if name not in recipe_names():
        near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(recipe_names())}."
        raise UsageError(f"--config: there is no recipe {name!r}. {hint}")
    return ["--config", str(files("torchrec_hilomoe") / "recipes" / f"{name}.yaml"), *rest], name


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """Add the nearest valid name to an error that is about an unknown one."""
    text = " ".join(str(error).split())
    known = [
        option.removeprefix("--")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    unknown = re.findall(r"(?:unrecognized arguments: --|[Kk]ey ['\"]|option ['\"])([\w.]+)", text)
    for name in unknown:
        if name not in known and (near := get_close_matches(name, known, n=1)):
            return f"{text} Did you mean {near[0]!r}?"
    return text
