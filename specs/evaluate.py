"""Evaluate: ``torchx run -s SCHEDULER specs/evaluate.py:evaluate -j 1x8 -- CHECKPOINT ...``."""

# ruff: noqa: UP006, UP035, UP045  # TorchX reads annotations of this form alone

from typing import Dict, List, Optional

from torchx.specs import AppDef

from torchrec_hilomoe.runtime import torchx_jobs as jobs


def evaluate(
    *args: str,
    j: str = "1x1",
    name: str = "evaluate",
    image: str = jobs.IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> AppDef:
    """Run apps/evaluate.py on every process of one or several hosts.

    Args:
        args: checkpoint and options of apps/evaluate.py, after a --
        j: HOSTSxPROCESSES
        name: name of the job
        image: container image, as specs/Dockerfile makes it
        h: named resource of a host, in place of cpu, gpu and memMB
        cpu: CPUs of a host; 0 is four a process
        gpu: GPUs of a host
        memMB: memory of a host in MB; 0 is 16384 a process
        env: environment variables (VAR1=v1,VAR2=v2)
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts a job that failed again
        rdzv_port: port of the first host on which the others find it
    """
    return jobs.ddp(
        *args,
        script="apps/evaluate.py",
        j=j,
        name=name,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
        max_restarts=0,
        rdzv_port=rdzv_port,
    )
