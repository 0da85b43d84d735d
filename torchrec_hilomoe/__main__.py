"""Train click-through-rate models with hierarchical rank-1 LoRA experts on TorchRec.

Examples:
    python -m torchrec_hilomoe train --out_dir runs/first
    python -m torchrec_hilomoe evaluate runs/first/checkpoints/step_3000
    python -m torchrec_hilomoe COMMAND --help
"""

import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from torchrec_hilomoe import doctor

__all__ = ["main"]

COMMANDS = {
    "train": "train a model: one process, or one of many that a launcher starts",
    "prepare": "turn a data set's raw files into Parquet and a schema",
    "evaluate": "evaluate a checkpoint, on any number of ranks",
    "export": "export a checkpoint as a folder that scores raw rows",
    "score": "score files of raw rows by an exported model",
    "probe": "find out whether experts will pay, and routed by which features",
    "report": "show a run as one HTML page",
    "plan": "plan a run on machines that are not here",
    "sweep": "search for better options",
    "doctor": "check that the installed packages belong together",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 when the user must mend something, or 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help"):
        _, _, examples = (__doc__ or "").partition("\n\n")
        listed = "\n".join(f"    {command:<10}{what}" for command, what in COMMANDS.items())
        sys.stdout.write(f"{examples}\nCommands:\n{listed}\n")
        return 0 if name else 2
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(COMMANDS)}."
        sys.stderr.write(f"error: there is no command {name!r}. {hint}\n")
        return 2
    if name == "doctor":
        if rest and rest[0] in ("-h", "--help"):
            sys.stdout.write("Example:\n    python -m torchrec_hilomoe doctor\n\n")
        return doctor.main(rest)
    try:
        import_module("torchrec")  # first, so that a broken set is explained and not traced back
    except (ImportError, OSError):
        return doctor.main([])
    try:
        return import_module(f"torchrec_hilomoe.apps.{name}").main(rest)
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
