"""Measure: ``torchx run -s SCHEDULER specs/benchmark.py:benchmark --bench hilomoe -- ...``."""

# ruff: noqa: UP006, UP035, UP045  # TorchX reads annotations of this form alone

from typing import Dict, List, Optional

from torchx.specs import AppDef

from torchrec_hilomoe.runtime import torchx_jobs as jobs


def benchmark(
    *args: str,
    bench: str,
    j: str = "1x1",
    name: str = "benchmark",
    image: str = jobs.IMAGE,
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> AppDef:
    """Run benchmarks/bench_BENCH.py, in one process or on every process of several hosts.

    What a host does besides spoils what is measured, so nothing is started again by itself.

    Args:
        args: options of the benchmark, after a --
        bench: which one, without bench_
        j: HOSTSxPROCESSES
        name: name of the job
        image: container image, as specs/Dockerfile makes it
        h: named resource of a host, in place of cpu, gpu and memMB
        cpu: CPUs of a host; 0 is four a process
        gpu: GPUs of a host
        memMB: memory of a host in MB; 0 is 16384 a process
        env: environment variables (VAR1=v1,VAR2=v2)
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        rdzv_port: port of the first host on which the others find it
    """
    options = {"h": h, "cpu": cpu, "gpu": gpu, "memMB": memMB, "env": env, "mounts": mounts}
    options |= {"m": f"benchmarks.bench_{bench}", "name": name, "image": image}
    if jobs.JobShape.parse(j).world_sizes == (1,):
        return jobs.single_process(*args, **options)
    return jobs.ddp(*args, j=j, max_restarts=0, rdzv_port=rdzv_port, **options)
