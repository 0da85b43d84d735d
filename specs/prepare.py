"""Prepare: ``torchx run -s SCHEDULER specs/prepare.py:prepare -- movielens --raw R --out O``."""

# ruff: noqa: UP006, UP035, UP045  # TorchX reads annotations of this form alone

from typing import Dict, List, Optional

from torchx.specs import AppDef

from torchrec_hilomoe.runtime import torchx_jobs as jobs


def prepare(
    *args: str,
    name: str = "prepare",
    image: str = jobs.IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> AppDef:
    """Run apps/prepare.py on one host.

    It writes a folder that is whole or absent, so it may be started again.

    Args:
        args: data set and options of apps/prepare.py, after a --
        name: name of the job
        image: container image, as specs/Dockerfile makes it
        h: named resource of the host, in place of cpu and memMB
        cpu: CPUs of the host; 0 is four
        memMB: memory of the host in MB; 0 is 16384
        env: environment variables (VAR1=v1,VAR2=v2)
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts a job that failed again
    """
    return jobs.single_process(
        *args,
        script="apps/prepare.py",
        name=name,
        image=image,
        h=h,
        cpu=cpu,
        memMB=memMB,
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )
