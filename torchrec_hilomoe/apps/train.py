"""Train a CTR model: one process, or one of many that a launcher starts.

Examples:
    python -m torchrec_hilomoe train --train.max_steps 500 --out_dir runs/first
    python -m torchrec_hilomoe train --config bst-movielens --data.path DIR --model.hilomoe null
    torchx run -s local_cwd dist.ddp -j 1x8 apps/train.py
    python -m torchrec_hilomoe train --help train.decay
"""

import os
import sys
from collections.abc import Sequence

from torchrec_hilomoe.command_line import DEFAULT_RECIPE, parse_run, recipe_names
from torchrec_hilomoe.options import help_text
from torchrec_hilomoe.runtime.console import print_result, set_up_console
from torchrec_hilomoe.runtime.distributed import init_distributed, PeerLostError, pg_timeout
from torchrec_hilomoe.serving.teacher import Teacher
from torchrec_hilomoe.training.non_finite import NonFiniteError
from torchrec_hilomoe.training.run import run_training


def main(argv: Sequence[str]) -> int:
    """Return 0 when trained or stopped on request, 2 when the user must mend something, else 1."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_console(rank)
    try:
        if asked := [place for place, word in enumerate(argv) if word in ("-h", "--help")]:
            print_result(_help(argv[asked[0] + 1 :]))
            return 0
        parsed = parse_run(argv)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with init_distributed(
            parsed.config.train.device, timeout=pg_timeout(parsed.config.stall_seconds)
        ) as context:
            run_training(parsed, context, Teacher)
    except (ValueError, NonFiniteError, PeerLostError) as error:
        which = f"[rank {rank}] " if rank else ""  # most mistakes are found by every rank
        print(f"{which}error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _help(topics: Sequence[str]) -> str:
    """Return the help of all options, or of the one, or of the group, that is named."""
    if topics and not topics[0].startswith("-"):
        return help_text(topics[0])
    _, _, examples = (__doc__ or "").partition("\n\n")
    recipes = ", ".join(recipe_names())
    return f"""{examples}
--config  text (default: {DEFAULT_RECIPE})
      YAML file, or name of a recipe; other options override it. Recipes: {recipes}.
      --help NAME shows one option, or one group of them.

{help_text()}"""
