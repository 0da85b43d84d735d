"""Starting ranks on this machine, and ending as a command should: with a sentence."""

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

from torchrec_hilomoe.runtime.console import set_up_console
from torchrec_hilomoe.runtime.distributed import PeerLostError

__all__ = ["exit_code", "per_rank_threads", "run_on_ranks", "without_ranks"]

INTERRUPTED = 130  # as a shell says it of SIGINT


def exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a benchmark and return 0, 2 for a user's mistake, 130 for Ctrl-C, or else 1."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_console(rank)
    logging.getLogger("torchrec_hilomoe").setLevel(logging.WARNING)  # no plan for each case
    # PyTorch's own, wherever a sharded table is touched; goes when TorchRec stores DTensors.
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    try:
        main(argv)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (PeerLostError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the lines that were written are whole", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_on_ranks(module: str, ranks: Sequence[int], argv: Sequence[str]) -> None:
    """Run a module under ``torchrun`` on each of some numbers of ranks, one after another.

    Args:
        module: Run as with ``python -m``.
        ranks: Numbers of processes, on this machine.
        argv: Its arguments.

    Raises:
        ValueError: If this is a rank already, or a number is below 1.
        subprocess.CalledProcessError: If a run fails.
    """
    if "RANK" in os.environ:
        raise ValueError("--ranks starts ranks, and this is one already; leave it to the launcher.")
    if min(ranks) < 1:
        raise ValueError(f"--ranks must be at least 1, got {min(ranks)}.")
    for number in ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={number}", "-m", module, *argv]
        # A number that is set is not overridden, and no warning is printed about it.
        environment = {**os.environ, "OMP_NUM_THREADS": str(shared_cores(number))}
        with subprocess.Popen(command, env=environment) as process:
            try:
                process.wait()
            except BaseException:
                # Its ranks end with it, if it is told to end; killed, it would leave them behind.
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def without_ranks(argv: Sequence[str]) -> list[str]:
    """Return the arguments for one of the numbers of ranks that ``--ranks`` named."""
    kept: list[str] = []
    skipping = False
    for word in argv:
        skipping = word == "--ranks" or (skipping and word.isdigit())
        if not skipping:
            kept.append(word)
    return kept


def per_rank_threads(asked: int | None) -> int:
    """Return how many threads this rank takes: those asked for, or its share of the cores.

    Raises:
        ValueError: If ``asked`` is below 1.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"--threads must be at least 1, got {asked}.")
    set_by_user = os.environ.get("OMP_NUM_THREADS")
    if asked is None and set_by_user:
        return int(set_by_user)
    return asked or shared_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def shared_cores(ranks: int) -> int:
    """Return the cores that each of some ranks of this machine has."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)
