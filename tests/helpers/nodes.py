"""Nodes of an elastic job on this machine, which can be lost as machines are: all at once.

A node is an agent of ``torchrun`` and the workers that it started. Agents find each other through
c10d on loopback, as they would over a network. They are forked, and their workers from them, with
torchrec loaded, so that a node starts in a moment instead of seconds.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import elastic_launch, LaunchConfig

from tests.helpers.processes import ROOT
from tests.helpers.runs import run_app_here

__all__ = [
    "IMPATIENT",
    "ElasticJob",
    "Node",
    "free_port",
    "kill_tree",
    "listens",
    "started",
    "wait_for",
]

# Of the rendezvous: a node is gone after five seconds of silence, not fifteen (with less, nodes
# that wait, and look around once a second, take each other for dead), and where fewer nodes than
# the most are enough, they wait three seconds for more, not thirty.
IMPATIENT = {"keep_alive_interval": 1, "keep_alive_max_attempt": 5, "last_call_timeout": 3}


@dataclass(frozen=True, kw_only=True)
class ElasticJob:
    """What all nodes of a job agree on.

    Attributes:
        names: Of the nodes that start together. The first holds the store in which all meet, and
            without which the job is lost.
        fewest: How many nodes it goes on with.
        port: Where they meet.
        argv: Of ``apps/train.py``.
        logs: What their workers write.
    """

    names: tuple[str, ...]
    fewest: int
    port: int
    argv: tuple[str, ...]
    logs: Path


class Node:
    """An agent with one worker, in processes of their own."""

    def __init__(self, job: ElasticJob, name: str, together: Barrier | None = None) -> None:
        self.folder = job.logs / name
        self.folder.mkdir(parents=True)
        self.process: BaseProcess = _context().Process(
            target=_agent, args=(job, self.folder, together)
        )
        self.process.start()

    @property
    def workers(self) -> list[int]:
        """The processes that the agent has started and that have not ended."""
        assert self.process.pid is not None
        return _children(self.process.pid)

    @property
    def shown(self) -> str:
        """What the agent and all workers of this node wrote, one worker after the other."""
        logs = sorted(path for path in self.folder.rglob("*.log") if path.is_file())
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs)

    def lose(self) -> None:
        """Let the node disappear."""
        assert self.process.pid is not None
        kill_tree(self.process.pid)
        self.process.join()

    def end(self, seconds: float) -> int:
        """Wait for the node's own end and return its exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.shown}"
        return self.process.exitcode


@contextmanager
def started(job: ElasticJob) -> Iterator[list[Node]]:
    """Start a job's nodes, to which more may be appended; in the end, none is left over."""
    nodes: list[Node] = []
    try:
        together = _context().Barrier(len(job.names))
        for name in job.names:
            nodes.append(Node(job, name, together))
        yield nodes
    finally:
        for node in nodes:
            if node.process.is_alive():
                node.lose()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, none of which can notice the others' end."""
    os.kill(pid, signal.SIGSTOP)
    for child in _children(pid):
        kill_tree(child)
    os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, otherwise: Callable[[], str]) -> None:
    """Wait until something is the case; when time is up, say what there is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.005)


def listens(port: int) -> bool:
    """Say whether somebody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrec", "tests.helpers.processes"])
    return context


def _agent(job: ElasticJob, folder: Path, together: Barrier | None) -> None:
    """The life of a node, as ``torchrun`` leads it; with others from the start, or later."""
    with (folder / "agent.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as the TorchX components do
    if together is not None:
        together.wait(60)
    if folder.name != job.names[0]:
        wait_for(lambda: listens(job.port), 60, lambda: "no node listens")
    config = LaunchConfig(
        min_nodes=job.fewest,
        max_nodes=len(job.names),
        nproc_per_node=1,
        run_id="elastic",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{job.port}",
        rdzv_configs={**IMPATIENT, "join_timeout": 60},
        local_addr="127.0.0.1",
        max_restarts=3,
        monitor_interval=0.05,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
    )
    elastic_launch(config, _worker)(list(job.argv))


def _worker(argv: list[str]) -> None:
    ended = run_app_here(argv)
    sys.stderr.write(ended.shown)
    if ended.code:
        sys.exit(ended.code)
