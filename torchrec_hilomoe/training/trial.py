"""A few steps of a small sharded model: ``python -m torchrec_hilomoe.training.trial``.

``python -m torchrec_hilomoe.doctor --train`` runs it in a process of its own: a set of packages
that does not fit can end the process, and that too must be told.
"""

import sys
import tempfile

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.runtime.console import set_up_console
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.run import run_training

__all__ = ["main"]

OPTIONS = (
    "--model.hilomoe.route_by=[[category],[hour],[category_history]]",  # too short to find them
    "--data.train_rows=512",
    "--data.eval_rows=128",
    "--train.batch_size=64",
    "--train.max_steps=4",
    "--train.device=auto",
)


def main() -> int:
    """Train, evaluate and save the default recipe's model on few rows; nothing is kept."""
    set_up_console(0)
    with tempfile.TemporaryDirectory() as folder:
        parsed = parse_run([*OPTIONS, f"--out_dir={folder}/run"])
        with init_distributed(parsed.config.train.device) as context:
            run_training(parsed, context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
