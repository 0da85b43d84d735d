"""Our own lines on the screen, and only those of other libraries that matter."""

import logging
import sys
import warnings

__all__ = ["counted", "set_up_console"]


def counted(number: int, thing: str) -> str:
    """Return a number and what it counts.

    Example:
        >>> counted(1, "rank"), counted(1024, "rank")
        ('1 rank', '1,024 ranks')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def set_up_console(rank: int) -> None:
    """Show this package's information on the first rank, and warnings of every rank.

    TorchRec logs its planner's internals as warnings at every start, and calls PyTorch in ways
    that PyTorch deprecates; neither is the user's to mend. TorchRec's errors stay.
    """
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        format=f"{prefix}%(message)s", level=logging.WARNING, stream=sys.stderr, force=True
    )
    logging.getLogger("torchrec_hilomoe").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torchrec", "torch.distributed.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
