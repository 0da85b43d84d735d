"""Train on any scheduler: ``torchx run -s SCHEDULER specs/train.py:train -j 2x8 -- ARGUMENTS``."""

# ruff: noqa: UP006, UP035, UP045  # TorchX reads annotations of this form alone

from typing import Dict, List, Optional

from torchx.specs import AppDef, macros

from torchrec_hilomoe.runtime import torchx_jobs as jobs


def train(
    *args: str,
    j: str = "1x1",
    name: str = "train",
    image: str = jobs.IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: Optional[int] = None,
    rdzv_port: int = 29500,
    rdzv_conf: str = "",
) -> AppDef:
    """Run apps/train.py on every process of one or several hosts.

    A run that is started again goes on from its newest checkpoint. It finds it by its folder, which
    all hosts must see: without --out_dir among the arguments, that is runs/ID of the job, in the
    working directory.

    Args:
        args: arguments of apps/train.py, after a --
        j: [MIN:]HOSTSxPROCESSES; with MIN, a job that loses hosts goes on with what is left
        name: name of the job
        image: container image, as specs/Dockerfile makes it
        h: named resource of a host, in place of cpu, gpu and memMB
        cpu: CPUs of a host; 0 is four a process
        gpu: GPUs of a host
        memMB: memory of a host in MB; 0 is 16384 a process
        env: environment variables (VAR1=v1,VAR2=v2)
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts again what has failed
        max_restarts: how often the processes are started again without the scheduler; by default
            three times on several hosts, and never on one
        rdzv_port: port of the first host on which the others find it
        rdzv_conf: options of the rendezvous (join_timeout=1200,last_call_timeout=60)
    """
    shape, options = jobs.JobShape.parse(j), list(args)
    if not jobs.option_given(args, "out_dir"):
        options.append(f"--out_dir=runs/{macros.app_id}")
    if len(shape.world_sizes) > 1 and not jobs.option_given(args, "data.num_canonical_shards"):
        options.append(f"--data.num_canonical_shards={shape.num_canonical_shards}")
    return jobs.ddp(
        *options,
        script="apps/train.py",
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
        max_restarts=max_restarts,
        rdzv_port=rdzv_port,
        rdzv_conf=rdzv_conf,
    )
