"""Search for better options: one run a trial, judged by validation; the same command goes on.

Example:
    python -m torchrec_hilomoe sweep --space space.yaml --out_dir runs/sweep --train.max_steps 500

where space.yaml has lines such as "train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}"
or "model.hilomoe.num_layers: [1, 2, 3]". Other flags are given to every run.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torchrec_hilomoe.command_line import AppParser, check_flags, parse_run
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.sweep.search import search
from torchrec_hilomoe.sweep.space import read_space
from torchrec_hilomoe.sweep.trials import run_trial


def main(argv: Sequence[str]) -> int:
    """Return 0 when done or stopped on request, 2 when the user must mend something."""
    set_up_console(0)
    parser = AppParser("sweep", __doc__)
    parser.add_argument("--space", type=Path, required=True, help="YAML: options and their values")
    parser.add_argument("--out_dir", type=Path, required=True, help="a folder a trial goes here")
    parser.add_argument("--trials", type=int, default=20, help="to be done in all")
    parser.add_argument("--metric", choices=["auc", "gauc", "logloss", "ne"], default="auc")
    parser.add_argument("--ranks", type=int, default=1, help="processes a run, on this machine")
    parser.add_argument("--sweep_seed", type=int, default=0, help="of the search, not of the runs")
    arguments, options = parser.parse_known_args(argv)
    try:
        check_flags(options, parser)
        parse_run(options)  # what is wrong for every run is told before the first

        def run(own, folder):
            return run_trial(
                [*options, *own], folder, metric=arguments.metric, ranks=arguments.ranks
            )

        best = search(
            read_space(arguments.space),
            arguments.out_dir,
            run,
            trials=arguments.trials,
            metric=arguments.metric,
            seed=arguments.sweep_seed,
            options=options,
            ranks=arguments.ranks,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if best is not None:
        print_result(json.dumps(best, indent=2))
    return 0
