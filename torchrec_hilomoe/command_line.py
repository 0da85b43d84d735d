"""The command line of a run: a recipe, dotted overrides, and help for what is mistyped."""

import argparse
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.option_names import did_you_mean, option_names, unknown_keys
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = [
    "DEFAULT_RECIPE",
    "ParsedRun",
    "UsageError",
    "check_flags",
    "parse_run",
    "recipe_names",
]

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
    parser.add_class_arguments(RunConfig, sub_configs=True)
    arguments, recipe = _with_recipe_path(_spell_out_switches(argv))
    check_flags(arguments, parser)
    _check_recipe(arguments[1])
    try:
        parsed = parser.parse_args(arguments)
        config = _run_config(parser.instantiate(parsed))
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise UsageError(_explain(error)) from error
    return ParsedRun(
        config=config, resolved=parser.dump(parsed.clone(), skip_unset=False), recipe=recipe
    )


def check_flags(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse a flag that is neither an option of a run nor one of a parser's own.

    Args:
        arguments: What was given.
        parser: Of the app.

    Raises:
        UsageError: Names the nearest of both.
    """
    own = {flag for action in parser._actions for flag in action.option_strings}
    names = {"config", *option_names(RunConfig)}
    names |= {flag.removeprefix("--") for flag in own if flag.startswith("--")}
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").removesuffix("+")  # --list+=item appends
        if name and flag.startswith("--") and name not in names:
            raise UsageError(f"there is no option --{name}. {did_you_mean(name, names)}")


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
            if not name:
                raise UsageError("--config needs a YAML file or the name of a recipe.")
        elif argument.startswith("--config="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return ["--config", _on_this_disk(name), *rest], name.rpartition("/")[2].rpartition(".")[0]
    if name not in recipe_names():
        near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(recipe_names())}."
        raise UsageError(f"--config: there is no recipe {name!r}. {hint}")
    return ["--config", str(files("torchrec_hilomoe") / "recipes" / f"{name}.yaml"), *rest], name


def _on_this_disk(path: str) -> str:
    """Return a path that the parser can open, of a file that may be in a store of the user's."""
    return path_manager.get_local_path(path) if path_manager.isfile(path) else path


def _check_recipe(path: str) -> None:
    """Look for unknown keys by ourselves: the parser overlooks groups without a value in them."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"--config: there is no file {path}. The recipes that are shipped are "
            f"{', '.join(recipe_names())}."
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"--config: {path} is not a mapping of options to values.")
    for name in unknown_keys(RunConfig, values):
        names = option_names(RunConfig)
        raise UsageError(f"{path}: there is no option {name!r}. {did_you_mean(name, names)}")


def _explain(error: Exception) -> str:
    """Shorten the parser's report, which lists what it tried for every type a value may have."""
    text = " ".join(str(error).split())
    # A group may be given as a file, too, so the parser says first that its value is none.
    text = re.sub(r"- Expected a path but .*? either not accessible or invalid - ", "", text)
    text = re.sub(r"\": Unable to load config '.*?' - Parser key \"[\w.]+(\.\w+\":)", r"\1", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"a typing.Literal\[(.*?)\]", r"one of \1", text)
    if unknown := re.search(r"Option '(\w+)' is not accepted", text):
        leaves = [name.rpartition(".")[2] for name in option_names(RunConfig)]
        text = text.replace(unknown[0], f"{unknown[0]}. {did_you_mean(unknown[1], leaves)}")
    union = re.fullmatch(
        r"([\w.]+: |)Does not validate against any of the Union subtypes Subtypes: .*? Errors: - "
        r"(.*) Given value type: .*? Given value: (.*)",
        text,
    )
    if union is not None:
        where, errors, value = union.groups()
        reasons = [
            reason for reason in errors.split(" - ") if not reason.startswith("Expected a NoneType")
        ]
        nothing_new = value.startswith(("Namespace(", "NestedArg(", "(")) or "Got value" in errors
        text = f"{where}{'; '.join(reasons)}{'' if nothing_new else f'. Got value: {value}'}"
    # An option of a group that may be null is named by the group and the key.
    text = re.sub(r"^([\w.]+): Problem with given class_path '.*?': Parser key \"", r"\1.", text)
    text = re.sub(r"^([\w.]+)\": ", r"\1: ", text)
    text = re.sub(r"(\?|of them\.)\.", r"\1", text)
    if "Expected a tuple" in text and "tuple[tuple" in text:
        text = f"{text}. Write a list of lists: '[[a], [b, c]]'."
    elif "Expected a tuple" in text:
        text = f"{text}. Write a list, even of one: '[a]' or '[a, b]'."
    return text
