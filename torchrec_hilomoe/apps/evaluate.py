"""Evaluate a checkpoint, on any number of ranks. Other flags override the run's configuration.

Examples:
    python -m torchrec_hilomoe evaluate runs/NAME/checkpoints/step_9
    python -m torchrec_hilomoe evaluate runs/NAME/checkpoints/step_9 --split valid --data.path DIR
"""

import argparse
import os
import sys
from collections.abc import Sequence

from torchrec_hilomoe.command_line import AppParser, check_flags
from torchrec_hilomoe.hilomoe.report_plots import draw_routing
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.distributed import init_distributed, PeerLostError
from torchrec_hilomoe.runtime.paths import explain_unwritten, make_folders_for, write_text
from torchrec_hilomoe.training.evaluation import evaluate_checkpoint, Evaluation


def show(found: Evaluation, arguments: argparse.Namespace) -> None:
    """Print the evaluation, and write and draw it where the arguments say."""
    report = found.to_json(arguments.split)
    print_result(report)
    if arguments.out:
        with explain_unwritten("--out", arguments.out):
            write_text(arguments.out, report + "\n")
    if arguments.plots and found.routing is None:
        print("drew nothing: no expert computes in this checkpoint's stage", file=sys.stderr)
    elif arguments.plots and found.routing is not None:
        for path in draw_routing(found.routing, arguments.plots):
            print(f"drew {path}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Return 0, 2 when the user must mend something, or 1 when another rank is lost."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_console(rank)
    parser = AppParser("evaluate", __doc__)
    parser.add_argument("checkpoint", help="a folder step_N of a run")
    parser.add_argument("--split", choices=["valid", "test"], default="test")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--slice", metavar="FEATURE", help="also by each value of this column")
    parser.add_argument("--out", metavar="FILE", help="also write the result, as JSON")
    parser.add_argument("--plots", metavar="DIR", help="draw the routing there, as PNG")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        check_flags(overrides, parser)
        picture = f"{arguments.plots}/SITE.png" if arguments.plots else None
        make_folders_for({"--out": arguments.out, "--plots": picture})
        with init_distributed(arguments.device) as context:
            path, split = arguments.checkpoint.rstrip("/"), arguments.split
            found = evaluate_checkpoint(
                path, split, tuple(overrides), context, slice_by=arguments.slice
            )
        if context.is_main:
            show(found, arguments)
    except (ValueError, ImportError, OSError, PeerLostError) as error:
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        return 1 if isinstance(error, PeerLostError) else 2
    return 0
