"""Sites against the float64 loops: each backend, dtype and option; outputs and gradients."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Setting
from tests.helpers.site_cases import check, config_of, OPTIONS

__all__ = ["cases"]

Sizes = tuple[int, int, int, int, int]  # N, D, O, L, E

# Beyond a tile in every direction, and odd; as wide as a real one.
ODD: Sizes = (17, 67, 71, 3, 5)
WIDE: Sizes = (33, 256, 192, 3, 8)
MANY: Sizes = (9, 128, 64, 3, 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# A compiled case takes seconds, so that its options are spread over more processes.
LANES = {"eager": 2, "triton": 3, "compiled": 6}


def cases(setting: Setting) -> list[Case]:
    """The default at every size first, then all options."""
    found: list[Case] = []
    for backend in LANES:
        dtypes = dict(DTYPES)
        if setting.rehearsal and backend != "eager":
            dtypes = {"fp32": torch.float32}  # the interpreter has no bfloat16, and C++ takes long
        wanted: list[tuple[str, str, Sizes, Mapping[str, Any]]] = []
        for dtype in dtypes:
            sizes = {"odd": ODD} if setting.rehearsal else {"odd": ODD, "wide": WIDE, "many": MANY}
            wanted += [(dtype, f"default, {name}", size, {}) for name, size in sizes.items()]
        options = dict(OPTIONS)
        if setting.rehearsal:
            options = {} if backend == "compiled" else {"tied": OPTIONS["tied"]}
        for dtype in dtypes:
            wanted += [(dtype, name, ODD, of) for name, of in options.items() if of]
        for index, (dtype, name, size, of) in enumerate(wanted):
            run = _check(size, {**of, "backend": backend}, DTYPES[dtype], setting.device)
            lane = f"{backend} {index % LANES[backend]}"
            title = f"{backend} {dtype} {name}"
            limit = 300 if setting.rehearsal else 90
            found.append(Case(name=title, run=run, lane=lane, seconds=limit))
    return found


def _check(
    sizes: Sizes, options: Mapping[str, Any], dtype: torch.dtype, device: str
) -> Callable[[], Mapping[str, Any]]:
    return partial(_run, sizes, options, dtype, device)


def _run(
    sizes: Sizes, options: Mapping[str, Any], dtype: torch.dtype, device: str
) -> Mapping[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()  # compiled code of earlier cases counts towards a limit
    check(sizes, config_of(*sizes[3:], **options), dtype, device=device)
    return {"say": "as exact as the loops in the same dtype", "sizes": list(sizes)}
