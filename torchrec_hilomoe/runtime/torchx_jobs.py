"""What the TorchX components in ``specs/`` share: ``dist.ddp`` with what clusters need beside it.

TorchX is given a component by its path and executes its text, which can therefore import nothing
that lies beside it; so this is here. TorchX itself is imported when a component is called, because
it is an extra.
"""

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, NoReturn, TYPE_CHECKING

if TYPE_CHECKING:
    from torchx.specs import AppDef, Role

__all__ = ["IMAGE", "JobShape", "ddp", "option_given", "refuse", "single_process"]

IMAGE = "torchrec-hilomoe:latest"  # what specs/Dockerfile is built as
CPUS_PER_PROCESS, MEGABYTES_PER_PROCESS = 4, 16_384
# What a scheduler of TorchX imports, and TorchX's extra that brings it.
EXTRAS = {
    "kubernetes": "kubernetes",
    "kubernetes_mcad": "kubernetes",
    "aws_batch": "boto3",
    "aws_sagemaker": "sagemaker",
    "gcp_batch": "google.cloud.batch_v1",
    "ray": "ray",
}
EXTRA_NAMES = {"kubernetes_mcad": "kubernetes"}
RENDERED_WITHOUT = {"aws_batch"}  # a dry run does not import it


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """Hosts and processes of a job.

    Attributes:
        min_hosts: Fewest hosts with which the job goes on.
        max_hosts: Hosts that the job asks for.
        processes: Processes on each host.
    """

    min_hosts: int
    max_hosts: int
    processes: int

    @classmethod
    def parse(cls, j: str) -> "JobShape":
        """Read ``[MIN:]HOSTSxPROCESSES``, as ``dist.ddp`` does."""
        from torchx.components.dist import parse_nnodes

        try:
            fewest, most, processes, _ = parse_nnodes(j)
        except ValueError:
            refuse(f"-j is [MIN:]HOSTSxPROCESSES, as in 2x8 or 1:2x8, got {j!r}.")
        if not 1 <= fewest <= most or processes < 1:
            refuse(
                "-j needs at least one host, at least one process, and MIN at most HOSTS, "
                f"got {j!r}."
            )
        return cls(min_hosts=fewest, max_hosts=most, processes=processes)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Every number of ranks that the job may come to have."""
        return tuple(n * self.processes for n in range(self.min_hosts, self.max_hosts + 1))

    @property
    def num_canonical_shards(self) -> int:
        """The fewest canonical shards of the data that each of those numbers divides."""
        return lcm(*self.world_sizes)


def ddp(
    *args: str,
    j: str,
    cpu: int = 0,
    memMB: int = 0,  # TorchX's own spelling
    env: Mapping[str, str] | None = None,
    max_restarts: int | None = None,
    rdzv_conf: str = "",
    **options: Any,
) -> "AppDef":
    """Return the job of ``dist.ddp`` with retries, a rendezvous and an environment for clusters.

    Args:
        args: Arguments of the script or module.
        j: ``[MIN:]HOSTSxPROCESSES``; with MIN, a job that loses hosts goes on with the others.
        cpu: CPUs of a host; 0 is four per process.
        memMB: Memory of a host in MB; 0 is 16384 per process.
        env: Environment variables, which win over those that are set here.
        max_restarts: How often torchrun restarts the processes after any of them has failed; None
            is three times on several hosts, where one may be lost, and never on a single one.
        rdzv_conf: Options of the rendezvous, such as ``join_timeout=1200,last_call_timeout=60``.
        options: Other arguments of ``dist.ddp``: script or m, name, image, h, gpu, mounts,
            max_retries, rdzv_port.
    """
    from torchx.components import dist
    from torchx.specs import RetryPolicy

    shape = JobShape.parse(j)
    app = dist.ddp(
        *args,
        j=j,
        cpu=cpu or CPUS_PER_PROCESS * shape.processes,
        memMB=memMB or MEGABYTES_PER_PROCESS * shape.processes,
        env=dict(env or {}),
        **options,
    )
    (role,) = app.roles
    several = shape.max_hosts > 1
    restarts = (3 if several else 0) if max_restarts is None else max_restarts
    added = f"torchrun --max_restarts {restarts} "
    added += f"--rdzv_conf {shlex.quote(rdzv_conf)} " if rdzv_conf else ""
    role.args[-1] = role.args[-1].replace("torchrun ", added, 1)
    if several:
        # Without it, agents keep the store of the first round for good, and a host that joins in a
        # later one looks for it in vain (pytorch/pytorch#135712 is about the same store).
        role.env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    else:
        role.port_map = {}  # nobody connects, so two jobs of one machine must not meet at a port
    if shape.min_hosts < shape.max_hosts:
        role.retry_policy = RetryPolicy.REPLICA  # a host that is lost leaves the others running
    else:
        role.min_replicas = None
    _set_environment(role, shape.processes)
    _check(role, shape.processes)
    return app


def single_process(*args: str, **options: Any) -> "AppDef":
    """Return the job of :func:`ddp` on one host, as one process without ``torchrun``."""
    app = ddp(*args, j="1x1", **options)
    (role,) = app.roles
    script = [options["script"]] if options.get("script") else ["-m", options["m"]]
    role.entrypoint, role.args = "python", [*script, *args]
    return app


def option_given(args: Sequence[str], name: str) -> bool:
    """Say whether ``--name`` is among the arguments.

    Example:
        >>> option_given(["--seed", "3", "--out_dir=runs/a"], "out_dir")
        True
    """
    return any(word == f"--{name}" or word.startswith(f"--{name}=") for word in args)


def refuse(message: str) -> NoReturn:
    """End as TorchX does with a component that it cannot use: with the message alone."""
    from torchx.specs.finder import ComponentValidationException

    raise ComponentValidationException(message)


def _set_environment(role: "Role", processes: int) -> None:
    cpus = role.resource.cpu
    if _asked(sys.argv).scheduler == "local_cwd":  # it runs here, whatever a host is said to have
        cpus = min(cpus, os.cpu_count() or 1)
    role.env.setdefault("OMP_NUM_THREADS", str(max(1, cpus // processes)))
    role.env.setdefault("PYTHONUNBUFFERED", "1")
    if role.resource.gpu > 0:
        role.env.setdefault("NCCL_DEBUG", "WARN")


def _check(role: "Role", processes: int) -> None:
    """Refuse what the scheduler or its hosts cannot do, in a sentence instead of a traceback."""
    gpus = role.resource.gpu
    if 0 < gpus < processes:
        refuse(
            f"-j starts {processes} processes on each host, but a host has {gpus} GPUs (--gpu or "
            f"-h): each process needs its own. Take {gpus} processes."
        )
    asked = _asked(sys.argv)
    package = EXTRAS.get(asked.scheduler)
    rendered = asked.dryrun and asked.scheduler in RENDERED_WITHOUT
    if package and not rendered and not _installed(package):
        extra = EXTRA_NAMES.get(asked.scheduler, asked.scheduler)
        refuse(
            f"-s {asked.scheduler} needs the package {package.partition('.')[0]!r}, which is not "
            f"installed. It comes with an extra of TorchX: pip install 'torchx[{extra}]'"
        )
    if asked.scheduler == "slurm":
        for name, value in ((n, v) for n, v in role.env.items() if "," in v):
            refuse(
                f"--env {name}={value}: Slurm ends a variable at a comma. Export it before torchx "
                "run instead; Slurm hands your environment on."
            )


def _asked(argv: Sequence[str]) -> argparse.Namespace:
    """Return what ``torchx run`` was asked for: its scheduler, None if unknown, and ``dryrun``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-s", "--scheduler")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser.parse_known_args(argv[2:] if argv[1:2] == ["run"] else [])[0]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
