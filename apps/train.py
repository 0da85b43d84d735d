"""Train a CTR model: one process, or one of many that a launcher starts.

python apps/train.py
torchx run -s local_cwd dist.ddp -j 1x8 apps/train.py
python apps/train.py --config bst-movielens --data.path DIR --model.hilomoe null
"""

import os
import sys

try:
    import torchrec  # noqa: F401  # first, so that a broken set is explained and not traced back
except (ImportError, OSError):
    from torchrec_hilomoe import doctor

    sys.exit(doctor.main([]))

from torchrec_hilomoe.command_line import parse_run, UsageError
from torchrec_hilomoe.runtime.console import set_up_console
from torchrec_hilomoe.runtime.distributed import join, patience, PeerLostError
from torchrec_hilomoe.runtime.launch_args import drop_launcher_residue
from torchrec_hilomoe.training.log.window import NonFiniteLossError
from torchrec_hilomoe.training.run import run_training


def main() -> int:
    """Return 0 when trained or stopped on request, 2 when the user must mend something, else 1."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_console(rank)
    try:
        parsed = parse_run(drop_launcher_residue(sys.argv[1:], __file__))
    except UsageError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with join(parsed.config.train.device, timeout=patience(parsed.config.stall_seconds)) as job:
            run_training(parsed, job)
    except (ValueError, NonFiniteLossError, PeerLostError) as error:
        which = f"[rank {rank}] " if rank else ""  # most mistakes are found by every rank
        print(f"{which}error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
