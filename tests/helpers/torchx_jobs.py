"""What each scheduler of TorchX would be given for a component of ``specs/``."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchx.runner import get_runner
from torchx.specs import AppDef

from tests.helpers.processes import ROOT

__all__ = ["SCHEDULERS", "Rendered", "render"]

OPTIONS = {"kubernetes": {"queue": "default"}, "aws_batch": {"queue": "default"}}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The first host of a job, as a scheduler is told of it.

    Attributes:
        hosts: How many the job has.
        command: What runs there.
        environment: Its variables.
        resources: CPUs, GPUs and memory, where the scheduler is told.
        retries: How often a failed job is started again, where the scheduler is told.
        request: All that the scheduler gets.
        app: TorchX's description of the job, which is the same for all schedulers.
    """

    hosts: int
    command: Sequence[str]
    environment: Mapping[str, str]
    resources: Mapping[str, int] | None
    retries: int | None
    request: Any
    app: AppDef


def render(scheduler: str, component: str, *arguments: str) -> Rendered:
    """Do what ``torchx run -s SCHEDULER --dryrun specs/COMPONENT.py:COMPONENT ARGUMENTS`` does."""
    with get_runner(component_defaults={}) as runner:
        path = os.path.relpath(ROOT / "specs" / f"{component}.py")
        with warnings.catch_warnings():
            # TorchX warns that Volcano 1.4 did not count retries rightly; later ones do.
            warnings.filterwarnings("ignore", r"\s*Role .* configured with restarts")
            # It can tell AWS Batch the kind of host of a named resource only.
            warnings.filterwarnings("ignore", "Cannot determine resource instance type")
            found = runner.dryrun_component(
                f"{path}:{component}", list(arguments), scheduler, cfg=OPTIONS.get(scheduler, {})
            )
    app = found._app
    assert app is not None
    return Rendered(**SCHEDULERS[scheduler](found.request), request=found.request, app=app)


def _local_cwd(request: Any) -> dict[str, Any]:
    hosts = [host for role in request.role_params.values() for host in role]
    return {
        "hosts": len(hosts),
        "command": hosts[0].args,
        "environment": hosts[0].env,
        "resources": None,
        "retries": None,
    }


def _local_docker(request: Any) -> dict[str, Any]:
    options = request.containers[0].kwargs
    requested = options.get("device_requests", [])
    return {
        "hosts": len(request.containers),
        "command": request.containers[0].command,
        "environment": options["environment"],
        "resources": {
            "cpu": options["nano_cpus"] // 10**9,
            "gpu": sum(device["Count"] for device in requested),
            "memMB": int(options["mem_limit"].removesuffix("m")),
        },
        "retries": options.get("restart_policy", {}).get("MaximumRetryCount", 0),
    }


def _slurm(request: Any) -> dict[str, Any]:
    first, *_ = request.replicas.values()
    options = first.sbatch_opts
    return {
        "hosts": len(request.replicas),
        "command": [first.entrypoint, *first.args],
        "environment": first.env,
        "resources": {
            "cpu": int(options["cpus-per-task"]),
            "gpu": int(options.get("gpus-per-task", 0)),
            "memMB": int(options["mem"]),
        },
        "retries": request.max_retries,
    }


def _kubernetes(request: Any) -> dict[str, Any]:
    job = request.resource["spec"]
    (container,) = job["tasks"][0]["template"].spec.containers
    limits = container.resources.limits
    return {
        "hosts": len(job["tasks"]),
        "command": container.command,
        "environment": {variable.name: variable.value for variable in container.env},
        "resources": {
            "cpu": int(limits["cpu"].removesuffix("m")) // 1000,
            "gpu": int(limits.get("nvidia.com/gpu", 0)),
            "memMB": int(limits["memory"].removesuffix("M")),
        },
        "retries": job["maxRetry"],
    }


def _aws_batch(request: Any) -> dict[str, Any]:
    nodes = request.job_def["nodeProperties"]
    container = nodes["nodeRangeProperties"][0]["container"]
    needs = {need["type"]: int(need["value"]) for need in container["resourceRequirements"]}
    return {
        "hosts": nodes["numNodes"],
        "command": container["command"],
        "environment": {pair["name"]: pair["value"] for pair in container["environment"]},
        "resources": {
            "cpu": needs["VCPU"],
            "gpu": needs.get("GPU", 0),
            "memMB": needs["MEMORY"],
        },
        "retries": request.job_def["retryStrategy"]["attempts"],
    }


SCHEDULERS = {
    "local_cwd": _local_cwd,
    "local_docker": _local_docker,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "aws_batch": _aws_batch,
}
