"""Turn a data set's raw files into a folder of Parquet and a schema for training.

Examples:
    python -m torchrec_hilomoe prepare movielens --raw RAW --out DIR
    python -m torchrec_hilomoe prepare movielens --help
    python -m torchrec_hilomoe prepare describe DIR [--plots FOLDER]
    python -m torchrec_hilomoe prepare schema init FILES --out schema.yaml
    python -m torchrec_hilomoe prepare check DIR
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from jsonargparse import ArgumentParser

from torchrec_hilomoe.data.prepare.describe import Description
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.outcomes import Checked, Draft
from torchrec_hilomoe.runtime.console import print_result, set_up_console

Outcome = Report | Description | Draft | Checked
# What a command is called with, for the example in its help.
ARGUMENTS = {"describe": "DIR", "check": "DIR", "schema init": "FILES --out FILE"}


def commands() -> Mapping[str, Callable[..., Outcome]]:
    """Return the data sets and the other commands by name.

    Raises:
        ModuleNotFoundError: If Polars is missing; says how to install it.
    """
    try:
        import polars  # noqa: F401 - an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('prepare wants polars: pip install "polars>=2.1,<3".') from error
    from torchrec_hilomoe.data.prepare.registry import COMMANDS

    return COMMANDS


def usage() -> str:
    """List the data sets and the other commands, each with the first line of its help."""
    firsts = {name: (make.__doc__ or "").splitlines()[0] for name, make in commands().items()}
    width = max(map(len, firsts)) + 2
    examples = (__doc__ or "").partition("\n\n")[2]
    return "\n".join([examples, "Commands:", *(f"  {n:<{width}}{firsts[n]}" for n in firsts)])


def prepare(argv: Sequence[str]) -> Outcome:
    """Run a command's function; its signature is the command line, its docstring the help.

    Raises:
        ValueError: If the command line or the data is wrong; says what would be right.
    """
    name, *rest = argv
    if name == "schema" and rest and rest[0] in ("init", "-h", "--help"):
        name, rest = "schema init", rest[rest[0] == "init" :]
    known = commands()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(known)}."
        raise ValueError(f"there is no data set {name!r}. {hint}")
    parser = ArgumentParser(
        prog=f"torchrec-hilomoe prepare {name}", exit_on_error=False, allow_abbrev=False
    )
    if name == "schema init":
        parser.add_argument("files", nargs="+", help="Parquet, or CSV with a header.")
        options = parser.add_function_arguments(known[name], skip={"files"})
    elif name in ARGUMENTS:
        options = parser.add_function_arguments(known[name], as_positional=True)
    else:
        options = parser.add_function_arguments(known[name], skip={"overwrite"})
        parser.add_argument("--overwrite", action="store_true", help="Replace data at --out.")
    if "-h" in rest or "--help" in rest:
        arguments = ARGUMENTS.get(name, "--raw RAW --out DIR")
        print(f"Example:\n    python -m torchrec_hilomoe prepare {name} {arguments}\n")
    try:
        parsed = parser.parse_args(rest)
    except ArgumentError as error:
        text = " ".join(str(error).split())
        for flag in re.findall(r"unrecognized arguments: --(\w+)", text):
            if near := get_close_matches(flag, [*options, "overwrite"], n=1):
                text = f"{text}. Did you mean --{near[0]}?"
        raise ValueError(text) from error
    return known[name](**parsed.as_dict())


def main(argv: Sequence[str]) -> int:
    """Return 0 when all is well, 1 when a checked folder is not, 2 for another mistake."""
    set_up_console(rank=0)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print_result(usage())
            return 0 if argv else 2
        found = prepare(argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_result(found.to_text() if isinstance(found, Draft | Checked) else found.to_json())
    return int(isinstance(found, Checked) and bool(found.faults))
