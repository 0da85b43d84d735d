"""What is shown: numbers as people write them, our own lines, and only what matters of others'."""

import logging
import os
import sys
import warnings

__all__ = ["counted", "format_bytes", "print_result", "set_up_console"]


def counted(number: int, thing: str) -> str:
    """Return a number and what it counts.

    Example:
        >>> counted(1, "rank"), counted(1024, "rank")
        ('1 rank', '1,024 ranks')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_bytes(amount: float) -> str:
    """Return an amount of memory as people write it.

    Example:
        >>> [format_bytes(amount) for amount in (512, 1536, 80 * 2**30)]
        ['512 B', '1.5 KB', '80.0 GB']
    """
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TB"


def print_result(text: str) -> None:
    """Print a command's result; quietly if nobody reads it to its end, as in ``... | head``."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
