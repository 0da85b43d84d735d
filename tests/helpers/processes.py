"""Real processes for tests: the ranks of a job, and whole commands.

Ranks find each other through the variables and the store that ``torchrun`` gives its workers, and
join through the package's own
:func:`~torchrec_hilomoe.runtime.distributed.init_distributed`. They are forked from a server that
has torchrec loaded, so that a rank starts in a moment instead of seconds.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from torchrec_hilomoe.runtime.distributed import init_distributed

__all__ = ["ROOT", "RankFailed", "run_command", "run_ranks", "torchrun_environment"]

ROOT = Path(__file__).parents[2]
LAST_WORDS = 5.0  # seconds in which other ranks may still fail, after the first has


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message has what each of those wrote."""


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 120.0,
    joined: bool = True,
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo job of its own, and return the results.

    Args:
        function: A function at the top level of a module.
        ranks: Number of processes.
        *args: Anything that can be pickled, the same for every rank.
        timeout: Seconds after which the ranks are ended.
        joined: Whether the process group exists when ``function`` is called; if not, it is
            ``function`` that joins, as an app does.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        RankFailed: If a rank raised, died, or did not end in time.
    """
    # As under torchrun, the launcher holds the store: no port is guessed, so none can be taken.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrec", "tests.helpers.processes"])
    with tempfile.TemporaryDirectory() as folder:
        desks = [Path(folder, f"rank {rank}") for rank in range(ranks)]
        processes = []
        for rank, desk in enumerate(desks):
            desk.with_suffix(".log").touch()
            environment = torchrun_environment(rank, ranks, store.port)
            call = (environment, desk, joined, function, args)
            processes.append(context.Process(target=_rank_main, args=call, daemon=True))
            processes[-1].start()
        try:
            _wait(processes, time.monotonic() + timeout)
            codes = [process.exitcode for process in processes]  # None: it is still running
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(code != 0 for code in codes):
            raise RankFailed("\n".join(map(_obituary, desks, codes)))
        return [pickle.loads(desk.with_suffix(".result").read_bytes()) for desk in desks]


def run_command(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit code and both its outputs.

    Args:
        argv: The command.
        env: Variables added to this process's.
        cwd: Where it runs.
        timeout: Seconds after which it is ended, with every process that it started.

    Raises:
        subprocess.TimeoutExpired: If it had to be ended.
    """
    with subprocess.Popen(
        [str(word) for word in argv],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended by themselves
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables of a worker whose launcher holds the store at a port of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank_main(
    environment: Mapping[str, str],
    desk: Path,
    joined: bool,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """The life of a rank; leaves a ``.log`` of all that was written, and its ``.result``."""
    with desk.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()  # a rank that crashes in foreign code writes where
    os.environ.update(environment)
    torch.set_num_threads(1)
    with init_distributed(device="cpu") if joined else contextlib.nullcontext():
        if joined:  # a rank that needs no other could be gone before the others have reached it
            dist.barrier()
        result = function(*args)
    desk.with_suffix(".result").write_bytes(pickle.dumps(result))


def _wait(processes: Sequence[BaseProcess], deadline: float) -> None:
    """Wait until all have ended, or one has failed and the others had their last words."""
    while running := [process.sentinel for process in processes if process.is_alive()]:
        now = time.monotonic()
        if any(process.exitcode for process in processes):
            deadline = min(deadline, now + LAST_WORDS)
        if now >= deadline:
            return
        wait(running, timeout=deadline - now)


def _obituary(desk: Path, code: int | None) -> str:
    """How a rank ended and what it had written."""
    end = "was still running" if code is None else f"ended with exit code {code}"
    return f"{desk.name} {end}:\n{desk.with_suffix('.log').read_text()}"
