"""What the device can do: the name, memory's bandwidth, and large products of each dtype."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Setting
from benchmarks.gpu.events import best_seconds

__all__ = ["cases"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases(setting: Setting) -> list[Case]:
    """One case: it takes a second."""
    return [Case(name="ceilings", run=partial(_run, setting))]


def _run(setting: Setting) -> Mapping[str, Any]:
    device, width = setting.device, 256 if setting.rehearsal else 8192
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        one, other = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        took = best_seconds([partial(torch.mm, one, other)], device)
        found[f"{name}_flops_per_second"] = 2 * width**3 / took
    block = torch.randn(2**20 if setting.rehearsal else 2**30, device=device)
    target = torch.empty_like(block)
    took = best_seconds([partial(target.copy_, block)], device)
    found["copied_bytes_per_second"] = 2 * block.numel() * block.element_size() / took
    say = ", ".join(f"{name} {found[f'{name}_flops_per_second'] / 1e12:.0f}" for name in DTYPES)
    if device == "cuda":
        at = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": at.multi_processor_count, "memory_bytes": at.total_memory}
    copied = found["copied_bytes_per_second"] / 1e12
    return {"say": f"TFLOP/s {say}; copies {copied:.2f} TB/s", **found}
