"""Try a grid: ``torchx run -s SCHEDULER specs/sweep.py:sweep --grid "seed=0,1" -- ARGUMENTS``."""

# ruff: noqa: UP006, UP035, UP045  # TorchX reads annotations of this form alone

from typing import Dict, List, Optional

from torchx.specs import AppDef, macros

from torchrec_hilomoe.runtime import torchx_jobs as jobs
from torchrec_hilomoe.sweep.space import combinations


def sweep(
    *args: str,
    grid: str,
    processes: int = 1,
    out_dir: str = f"runs/{macros.app_id}",
    name: str = "sweep",
    image: str = jobs.IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
) -> AppDef:
    """Train every combination of some options' values, each in a role and on a host of its own.

    Args:
        args: arguments of apps/train.py that all trials share, after a --
        grid: options and their values (train.learning_rate=0.001,0.003 seed=0,1,2)
        processes: of each trial
        out_dir: folder of the trials' folders, trial-0 and so on; all hosts must see it
        name: name of the job
        image: container image, as specs/Dockerfile makes it
        h: named resource of a host, in place of cpu, gpu and memMB
        cpu: CPUs of a host; 0 is four a process
        gpu: GPUs of a host
        memMB: memory of a host in MB; 0 is 16384 a process
        env: environment variables (VAR1=v1,VAR2=v2)
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts what failed again
        max_restarts: how often a trial's processes are started again without the scheduler
    """
    try:
        points = combinations(grid)
    except ValueError as error:
        jobs.refuse(str(error))
    roles = []
    for number, options in enumerate(points):
        app = jobs.ddp(
            *args,
            *options,
            f"--out_dir={out_dir}/trial-{number}",
            script="apps/train.py",
            j=f"1x{processes}",
            name=name,
            image=image,
            h=h,
            cpu=cpu,
            gpu=gpu,
            memMB=memMB,
            env=env,
            mounts=mounts,
            max_retries=max_retries,
            max_restarts=max_restarts,
        )
        app.roles[0].name = f"trial-{number}"
        roles += app.roles
    return AppDef(name=name, roles=roles)
