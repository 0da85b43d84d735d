"""Turn a data set's raw files into a folder of Parquet and a schema that apps/train.py reads.

Usage:
    python apps/prepare.py movielens --raw RAW --out DIR
    python apps/prepare.py movielens --help
    python apps/prepare.py describe DIR [--plots FOLDER]
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches

from jsonargparse import ArgumentParser

from torchrec_hilomoe.data.prepare.describe import Description
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.registry import COMMANDS
from torchrec_hilomoe.runtime.console import set_up_console


def usage() -> str:
    """List the data sets and ``describe``, each with the first line of its help."""
    firsts = {name: (make.__doc__ or "").splitlines()[0] for name, make in COMMANDS.items()}
    width = max(map(len, firsts)) + 2
    return "\n".join([__doc__ or "", "Commands:", *(f"  {n:<{width}}{firsts[n]}" for n in firsts)])


def prepare(argv: Sequence[str]) -> Report | Description:
    """Run a command's function; its signature is the command line, its docstring the help.

    Raises:
        ValueError: If the command line or the data is wrong; says what would be right.
    """
    name, *rest = argv
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(COMMANDS)}."
        raise ValueError(f"there is no data set {name!r}. {hint}")
    parser = ArgumentParser(prog=f"prepare.py {name}", exit_on_error=False, allow_abbrev=False)
    if name == "describe":
        options = parser.add_function_arguments(COMMANDS[name], as_positional=True)
    else:
        options = parser.add_function_arguments(COMMANDS[name], skip={"overwrite"})
        parser.add_argument("--overwrite", action="store_true", help="Replace data at --out.")
    try:
        parsed = parser.parse_args(rest)
    except ArgumentError as error:
        text = " ".join(str(error).split())
        for flag in re.findall(r"unrecognized arguments: --(\w+)", text):
            if near := get_close_matches(flag, [*options, "overwrite"], n=1):
                text = f"{text}. Did you mean --{near[0]}?"
        raise ValueError(text) from error
    return COMMANDS[name](**parsed.as_dict())


def main(argv: Sequence[str]) -> int:
    """Return 0 when the folder is whole, 2 when the user must mend something."""
    set_up_console(rank=0)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        report = prepare(argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
