"""What the TorchX components in ``specs/`` have in common: a host, its environment, ``torchrun``.

TorchX is given a component by its path and executes its text, which can therefore import nothing
that lies beside it; so this is here. TorchX itself is imported when a component is called, because
it is an extra.
"""

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import NoReturn, TYPE_CHECKING

if TYPE_CHECKING:
    from torchx.specs import AppDef, Resource, Role

__all__ = [
    "IMAGE",
    "Host",
    "Meeting",
    "combinations",
    "command_role",
    "job",
    "option_given",
    "torchrun_role",
]

IMAGE = "torchrec-hilomoe:latest"  # what specs/Dockerfile is built as
CPUS_A_PROCESS, MEGABYTES_A_PROCESS = 4, 16_384
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
class Host:
    """What each host of a role gives to its processes.

    Attributes:
        image: Of the container, for schedulers that start one.
        h: A named resource of TorchX; takes the place of the three below.
        cpu: Of a host; 0 is four a process.
        gpu: Of a host.
        memMB: Of a host; 0 is 16 GiB a process.
        env: Variables, which win over those that are set here.
        mounts: As TorchX takes them, ``type=bind,src=/data,dst=/data,readonly``.
        max_retries: How often the scheduler starts what has failed again.
    """

    image: str = IMAGE
    h: str | None = None
    cpu: int = 0
    gpu: int = 0
    memMB: int = 0  # the name that TorchX's own components have for it
    env: Mapping[str, str] | None = None
    mounts: Sequence[str] = ()
    max_retries: int = 0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How the agents of several hosts find each other, and again after one is lost.

    Attributes:
        j: ``[MIN:]HOSTSxPROCESSES``.
        rdzv_port: Where the first host listens.
        rdzv_conf: Options of the rendezvous, ``join_timeout=1200,last_call_timeout=60``.
        max_restarts: How often the agents start their workers again, after any of them has failed;
            None is three times where a host may be lost, and never on a single one.
    """

    j: str = "1x1"
    rdzv_port: int = 29500
    rdzv_conf: str = ""
    max_restarts: int | None = None

    def __post_init__(self) -> None:
        try:
            (fewest, most), processes = self.hosts, self.processes
        except ValueError:
            _refuse(f"-j is [MIN:]HOSTSxPROCESSES, as in 2x8 or 1:2x8, got {self.j!r}.")
        if not 1 <= fewest <= most or processes < 1:
            _refuse(
                f"-j needs at least one host, one process, and no more hosts at least than at "
                f"most, got {self.j!r}."
            )

    @property
    def hosts(self) -> tuple[int, int]:
        """The fewest and the most hosts."""
        from torchx.components.dist import parse_nnodes

        fewest, most, _, _ = parse_nnodes(self.j)
        return fewest, most

    @property
    def processes(self) -> int:
        """Of each host."""
        from torchx.components.dist import parse_nnodes

        return parse_nnodes(self.j)[2]

    @property
    def restarts(self) -> int:
        """How often workers are started again."""
        if self.max_restarts is not None:
            return self.max_restarts
        return 3 if self.hosts[1] > 1 else 0

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Every number of ranks that the job may come to have."""
        fewest, most = self.hosts
        return tuple(hosts * self.processes for hosts in range(fewest, most + 1))

    @property
    def lanes(self) -> int:
        """The fewest lanes of data that each of those numbers divides."""
        return lcm(*self.world_sizes)


def job(name: str, *roles: "Role") -> "AppDef":
    """Return a job, unless its scheduler's extra of TorchX is missing."""
    from torchx.specs import AppDef

    _check_scheduler(sys.argv, roles)
    return AppDef(name=name, roles=list(roles))


def torchrun_role(name: str, program: Sequence[str], host: Host, meeting: Meeting) -> "Role":
    """Return hosts that run ``program``, a script or a module with its arguments, on every rank."""
    from torchx.specs import macros, RetryPolicy

    (fewest, most), several = meeting.hosts, meeting.hosts[1] > 1
    # The scheduler says where the first host is; on that host itself, some of them do not. "$$" is
    # a dollar sign to TorchX, which replaces names after a single one.
    endpoint = f"$${{{macros.rank0_env}:=localhost}}:{meeting.rdzv_port}"
    command = [
        "torchrun",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={endpoint if several else 'localhost:0'}",
        f"--rdzv_id={macros.app_id}",
        f"--nnodes={fewest}:{most}" if fewest < most else f"--nnodes={most}",
        f"--nproc_per_node={meeting.processes}",
        f"--max_restarts={meeting.restarts}",
        "--tee=3",
    ]
    if meeting.rdzv_conf:
        command.append(f"--rdzv_conf={shlex.quote(meeting.rdzv_conf)}")
    line = " ".join([*command, *map(shlex.quote, program)])
    role = _role(name, host, meeting.processes, entrypoint="bash", args=["-c", line])
    role.num_replicas = most
    if several:
        role.port_map = {"c10d": meeting.rdzv_port}
        # With it, agents keep the store of the first round for good, and a host that joins in a
        # later one looks for it in vain (pytorch/pytorch#135712 is about the same store).
        role.env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if fewest < most:
        role.min_replicas = fewest
        role.retry_policy = RetryPolicy.REPLICA  # one that is lost leaves the others running
    return role


def command_role(name: str, command: Sequence[str], host: Host) -> "Role":
    """Return one host that runs one command in one process."""
    return _role(name, host, 1, entrypoint=command[0], args=list(command[1:]))


def option_given(args: Sequence[str], name: str) -> bool:
    """Say whether ``--name`` is among the arguments.

    Example:
        >>> option_given(["--seed", "3", "--out_dir=runs/a"], "out_dir")
        True
    """
    return any(word == f"--{name}" or word.startswith(f"--{name}=") for word in args)


def combinations(grid: str) -> tuple[tuple[str, ...], ...]:
    """Read ``OPTION=VALUE,VALUE OPTION=...`` and return the arguments of every combination.

    A comma inside brackets belongs to its value.

    Example:
        >>> combinations("seed=0,1 model.sites=[head,ffn]")
        (('--seed=0', '--model.sites=[head,ffn]'), ('--seed=1', '--model.sites=[head,ffn]'))
    """
    choices = []
    for words in shlex.split(grid):
        name, is_given, values = words.partition("=")
        found = re.findall(r"(?:[^,\[{]|\[[^]]*\]|\{[^}]*\})+", values)
        if not name or not is_given or not found or ",".join(found) != values:
            _refuse(f"--grid is 'OPTION=VALUE,VALUE OPTION=VALUE,...', got {words!r} in {grid!r}.")
        choices.append([f"--{name.removeprefix('--')}={value}" for value in found])
    if not choices:
        _refuse("--grid names no option, as 'train.learning_rate=0.001,0.003 seed=0,1' does.")
    return tuple(itertools.product(*choices))


def _role(name: str, host: Host, processes: int, *, entrypoint: str, args: list[str]) -> "Role":
    from torchx.specs import parse_mounts, resource, Role

    here = resource(
        cpu=host.cpu or CPUS_A_PROCESS * processes,
        gpu=host.gpu,
        memMB=host.memMB or MEGABYTES_A_PROCESS * processes,
        h=host.h,
    )
    if 0 < here.gpu < processes:
        _refuse(
            f"-j starts {processes} processes on each host, but a host has {here.gpu} GPUs (--gpu, "
            f"or -h {host.h}): each process needs its own. Take {here.gpu} processes."
        )
    return Role(
        name=name,
        image=host.image,
        entrypoint=entrypoint,
        args=args,
        env={**_environment(here, processes), **(host.env or {})},
        resource=here,
        max_retries=host.max_retries,
        mounts=parse_mounts(list(host.mounts)) if host.mounts else [],
    )


def _environment(host: "Resource", processes: int) -> dict[str, str]:
    cpus = host.cpu
    if _asked(sys.argv).scheduler == "local_cwd":  # it runs here, whatever a host is said to have
        cpus = min(cpus, os.cpu_count() or 1)
    found = {
        "LOGLEVEL": "WARNING",
        "OMP_NUM_THREADS": str(max(1, cpus // processes)),
        "PYTHONUNBUFFERED": "1",
    }
    if host.gpu > 0:
        found["NCCL_DEBUG"] = "WARN"
    return found


def _asked(argv: Sequence[str]) -> argparse.Namespace:
    """Return what ``torchx run`` was asked for: its scheduler, None if unknown, and ``dryrun``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-s", "--scheduler")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser.parse_known_args(argv[2:] if argv[1:2] == ["run"] else [])[0]


def _check_scheduler(argv: Sequence[str], roles: Sequence["Role"]) -> None:
    """Refuse what ``torchx run -s SCHEDULER`` cannot do, in a sentence instead of a traceback."""
    asked = _asked(argv)
    package = EXTRAS.get(asked.scheduler)
    rendered = asked.dryrun and asked.scheduler in RENDERED_WITHOUT
    if package and not rendered and not _installed(package):
        extra = EXTRA_NAMES.get(asked.scheduler, asked.scheduler)
        _refuse(
            f"-s {asked.scheduler} needs the package {package.partition('.')[0]!r}, which is not "
            f"installed. It comes with an extra of TorchX: pip install 'torchx[{extra}]'"
        )
    if asked.scheduler == "slurm":
        for name, value in ((n, v) for role in roles for n, v in role.env.items() if "," in v):
            _refuse(
                f"--env {name}={value}: Slurm ends a variable at a comma. Export it before torchx "
                "run instead; Slurm hands your environment on."
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _refuse(message: str) -> NoReturn:
    """End as TorchX does with a component that it cannot use: with the message alone."""
    from torchx.specs.finder import ComponentValidationException

    raise ComponentValidationException(message)
