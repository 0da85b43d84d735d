"""The command line of a run: a recipe, dotted overrides, and help for what is mistyped."""

import argparse
import json
import os
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.options import (
    did_you_mean,
    old_options,
    option_names,
    renew_options,
    unknown_keys,
)
from torchrec_hilomoe.runtime.documents import build, DocumentError, parse_yaml, read_text
from torchrec_hilomoe.runtime.paths import path_manager

__all__ = [
    "DEFAULT_RECIPE",
    "AppParser",
    "Notes",
    "ParsedRun",
    "Recorded",
    "UsageError",
    "check_flags",
    "parse_run",
    "parse_saved",
    "recipe_names",
]

DEFAULT_RECIPE = "bst-synthetic"
LISTS_OF_LISTS = "model.hilomoe.route_by"
# What a user calls a type that the parser names as Python does.
WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list",
}
NOTES = "notes"  # in a recipe, beside its options
# With these a run ends with the same numbers, or with those of another seed.
HARMLESS = (
    *("seed", "out_dir", "resume", "stall_seconds", "train.log_every"),
    *(f"checkpoint.{name}" for name in ("every_steps", "keep", "folder", "asynchronous")),
)


class UsageError(ValueError):
    """The command line or a recipe is wrong; the message says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run that somebody has made.

    Attributes:
        command: How.
        test_auc: What it brought.
    """

    command: str
    test_auc: float


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a recipe's notes say of the same run without experts.

    Attributes:
        command: How it was run, but for the seed.
        test_auc: What it brought with seed 0, 1 and so on.
    """

    command: str
    test_auc: tuple[float, ...]

    def of_seed(self, seed: int) -> Recorded | None:
        """Return the run of a seed, if there is one."""
        if not 0 <= seed < len(self.test_auc):
            return None
        return Recorded(command=f"{self.command} --seed {seed}", test_auc=self.test_auc[seed])


@dataclass(frozen=True, kw_only=True)
class ParsedRun:
    """A command line, resolved.

    Attributes:
        config: The whole run.
        resolved: Configuration as YAML, which ``--config`` takes back.
        recipe: Name of the recipe or of the file that it came from.
        notes: Of the recipe; None where it has none, or an option makes it another run.
    """

    config: RunConfig
    resolved: str
    recipe: str
    notes: Notes | None = None


class AppParser(argparse.ArgumentParser):
    """The parser of an app's own options, whose help begins with examples.

    Args:
        name: Of the app.
        document: What it does in one line; then its examples.
    """

    def __init__(self, name: str, document: str | None) -> None:
        what, _, examples = (document or "").partition("\n\n")
        super().__init__(prog=f"torchrec-hilomoe {name}", description=what, allow_abbrev=False)
        self._examples = examples.strip()

    def format_help(self) -> str:
        """Return the examples, then what the parser says."""
        return f"{self._examples}\n\n{super().format_help()}"


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
    overrides, given = _without_config(_spell_out_switches(argv))
    values, recipe, notes = _read_recipe(given)
    parsed = _parse(values, overrides, recipe, f"--config {given}")
    same = all(name in HARMLESS for name, _ in _pairs(overrides))
    return replace(parsed, notes=notes) if same else parsed


def parse_saved(
    text: str, overrides: Sequence[str] = (), *, where: str = "the saved configuration"
) -> ParsedRun:
    """Read the configuration that a run has saved, even one of the last release.

    Args:
        text: YAML, as in ``ParsedRun.resolved``.
        overrides: Arguments that win.
        where: The file, for the message.

    Raises:
        UsageError: For an unknown flag, key or value, or a text that is no configuration.
    """
    try:
        values = renew_options(parse_yaml(text, where))
    except DocumentError as error:
        raise UsageError(f"{error}. Give a checkpoint whose configuration is whole.") from error
    _check_keys(values, f"{where}: there is no option ", repr)
    return _parse(values, _spell_out_switches(overrides), "saved", where)


def check_flags(arguments: Sequence[str], parser: argparse.ArgumentParser | None = None) -> None:
    """Refuse a flag that is neither an option of a run nor one of a parser's own.

    Args:
        arguments: What was given.
        parser: Of the app, where it has options of its own.

    Raises:
        UsageError: Names the nearest of both, or the new name of an old one.
    """
    own = {flag for action in parser._actions for flag in action.option_strings} if parser else ()
    names = {"config", *option_names(RunConfig)}
    names |= {flag.removeprefix("--") for flag in own if flag.startswith("--")}
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").removesuffix("+")  # --list+=item appends
        if name and flag.startswith("--") and name not in names:
            raise UsageError(f"there is no option --{name}. {did_you_mean(name, names)}")


def _parse(values: dict[str, Any], overrides: Sequence[str], recipe: str, where: str) -> ParsedRun:
    check_flags(overrides)
    _check_groups(overrides)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, sub_configs=True)
    try:
        given = ["--config", json.dumps(_with_switch(values))]
        parsed = parser.parse_args([*given, *_with_switches(overrides)])
        found: dict[str, Any] = vars(parser.instantiate(parsed))
        config = RunConfig(**{field.name: found[field.name] for field in fields(RunConfig)})
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        if overrides:
            _parse(values, (), recipe, where)  # which says so, if the file is to blame
            raise UsageError(_explain(error)) from error
        raise UsageError(f"{where}: {_explain(error)}") from error
    resolved = parser.dump(parsed.clone(), skip_unset=False)
    return ParsedRun(config=config, resolved=resolved, recipe=recipe)


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """Turn a bare ``--dry_run`` into ``--dry_run true``, which is how the parser reads switches."""
    spelled = []
    for argument, following in zip(argv, [*argv, "--"][1:], strict=True):
        spelled.append(argument)
        if argument == "--dry_run" and following.startswith("--"):
            spelled.append("true")
    return spelled


def _without_config(argv: Sequence[str]) -> tuple[list[str], str]:
    """Part the overrides, which win wherever they stand, from the recipe."""
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
    return rest, name


def _read_recipe(name: str) -> tuple[dict[str, Any], str, Notes | None]:
    """Return what a recipe or a file of the user's, maybe in a store, says, its name, its notes."""
    path, recipe = name, name.rpartition("/")[2].rpartition(".")[0]
    if not name.endswith((".yaml", ".yml")) and "/" not in name:
        if name not in recipe_names():
            near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {_listed_recipes()}."
            backbone = name.removesuffix("-parquet")
            if backbone != name and f"{backbone}-movielens" in recipe_names():
                hint = (
                    "Data of your own need none: give --data.path DIR --model.backbone "
                    f"{backbone}, where DIR is what apps/prepare.py wrote."
                )
            raise UsageError(f"--config: there is no recipe {name!r}. {hint}")
        path, recipe = str(files("torchrec_hilomoe") / "recipes" / f"{name}.yaml"), name
    values = _read_yaml(path)
    data = values.get("data")
    if isinstance(data, dict) and isinstance(schema := data.get("data_schema"), str):
        # A file beside the recipe.
        data["data_schema"] = _read_yaml(os.path.join(os.path.dirname(path), schema))
    notes = _pop_notes(values, path)
    _check_keys(values, f"{path}: there is no option ", repr)
    return values, recipe, notes


def _pop_notes(values: dict[str, Any], path: str) -> Notes | None:
    """Take the notes out of a recipe, so that options alone are left."""
    if (notes := values.pop(NOTES, None)) is None:
        return None
    try:
        built = build(Notes, notes)
    except DocumentError as error:
        raise UsageError(f"{path}: in {NOTES}, {error}.") from error
    return replace(built, test_auc=tuple(built.test_auc))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        if not path_manager.exists(path):
            raise UsageError(
                f"--config: there is no file {path}. The recipes that are shipped are "
                f"{_listed_recipes()}."
            )
        return parse_yaml(read_text(path), path)
    except (OSError, DocumentError) as error:
        raise UsageError(
            f"--config: cannot read {path}: {error}. It must map options to values, as a run's "
            "config.yaml does."
        ) from error


def _listed_recipes() -> str:
    return ", ".join(recipe_names())


def _check_keys(values: Mapping[str, Any], told: str, quoted: Any) -> None:
    """Look for unknown keys by ourselves, and tell all of them: the parser tells the first."""
    names = list(option_names(RunConfig))
    wrong = [
        f"{told}{quoted(name)}. {did_you_mean(name, names)}"
        for name in unknown_keys(RunConfig, values)
    ]
    if wrong or (wrong := list(old_options(values))):
        raise UsageError(" ".join(wrong))


def _check_groups(overrides: Sequence[str]) -> None:
    """Look into the values of options that are groups, such as ``--train.stages '[{...}]'``."""
    for name, text in _pairs(overrides):
        value = _loaded(text)
        for part in reversed(name.split(".")):
            value = {part: value}
        _check_keys(value, "there is no option --", str)


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser says what it cannot read


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield the name and the value of each flag that has one."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            name, given, value = argument.removeprefix("--").partition("=")
            yield name, value if given else following


def _with_switch(values: dict[str, Any]) -> dict[str, Any]:
    """Spell out ``hilomoe: null``, which is short for experts that are not enabled."""
    model = values.get("model")
    if isinstance(model, dict) and "hilomoe" in model and model["hilomoe"] is None:
        return {**values, "model": {**model, "hilomoe": {"enabled": False}}}
    return values


def _with_switches(overrides: Sequence[str]) -> list[str]:
    """Spell out ``--model.hilomoe null`` and ``--model '{hilomoe: null}'`` likewise."""
    spelled = list(overrides)
    for place, argument in enumerate(overrides):
        name, joined, text = argument.partition("=")
        at = place if joined else place + 1
        if name not in ("--model", "--model.hilomoe") or at == len(overrides):
            continue
        value = _loaded(text if joined else overrides[at])
        group = {"hilomoe": value} if name == "--model.hilomoe" else value
        renewed = _with_switch({"model": group})["model"]
        if renewed != group:
            text = json.dumps(renewed if name == "--model" else renewed["hilomoe"])
            spelled[at] = f"{name}={text}" if joined else text
    return spelled


def _explain(error: Exception) -> str:
    """Shorten the parser's report, which lists what it tried for every type a value may have."""
    text = " ".join(str(error).split())
    # A group may be given as a file, too, so the parser says first that its value is none.
    text = re.sub(r"- Expected a path but .*? either not accessible or invalid - ", "", text)
    text = re.sub(r"\": Unable to load config '.*?' - Parser key \"[\w.]+(\.\w+\":)", r"\1", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"a typing.Literal\[(.*?)\]", r"one of \1", text)
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
    # What is wrong inside a group is told by its path alone.
    text = re.sub(r"Does not validate against any of .*? Errors:;? |- Errors: ", "", text)
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"Parser key \"([\w.]+)\":", r"\1:", text)
    for name, words in WORDS.items():
        text = text.replace(f"Expected a {name}.", f"Expected {words}.")
    if f"Expected {WORDS['tuple']}" in text:
        nested = text.startswith(LISTS_OF_LISTS)
        like = (
            "a list of lists: '[[a], [b, c]]'"
            if nested
            else "a list, even of one: '[a]' or '[a, b]'"
        )
        text = f"{text}. Write {like}."
    return text
