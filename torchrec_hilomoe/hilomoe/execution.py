"""How a site computes: decided when it is built, logged once, refused with every reason.

``"auto"`` means eager. The compiled form of the same function fuses the work between the products,
which pays where they are small (``benchmarks/LOG.md``), but takes a compiler and a minute of it at
the first batch; the Triton kernels give up bit-identity with ``nn.Linear`` at the start. So both
are for the user to ask for.
"""

import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = ["Execution", "execution_for", "gathering_pays"]

MOST_VECTORS = 256  # a kernel keeps a row's hidden values of all experts in registers

_log = logging.getLogger(__name__)

ExpertsName = Literal["dense", "gathered", "indexed"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a site computes.

    Attributes:
        backend: ``eager``; ``compiled``, its function going through ``torch.compile``; or
            ``triton``, by the kernels of `fused`, for which the other two are no questions.
        experts: How rows meet the vectors that they chose, on a CPU; see `experts`.
        gpu_experts: The same on a GPU, wherever the site was built.
        space: Where the layers' recursion runs; see `routing`.
    """

    backend: Literal["eager", "compiled", "triton"]
    space: Literal["scores", "queries"]
    experts: ExpertsName
    gpu_experts: ExpertsName


def execution_for(config: HiLoMoEConfig, width: int) -> Execution:
    """Decide how a site of this width computes.

    Raises:
        ValueError: If the configuration asks for a backend that cannot be had here.
    """
    backend = "eager" if config.backend == "auto" else config.backend
    reasons = {"compiled": _against_compiling, "triton": _against_triton}
    against = reasons[backend](config) if backend in reasons else ()
    if against:
        raise ValueError(
            f"HiLoMoEConfig.backend = {config.backend!r} cannot be used here: "
            f"{'; '.join(against)}. Use backend='auto' or 'eager'."
        )
    gathered = backend == "eager" and gathering_pays(config.num_experts, config.top_k, width)
    moving = backend == "eager" and _moving_queries_pays(config, width)
    execution = Execution(
        backend=backend,
        experts="indexed" if backend == "compiled" else "gathered" if gathered else "dense",
        # Embedding bags have no bfloat16 there, and a matrix unit hardly notices a dense bank.
        gpu_experts="indexed" if backend == "compiled" else "dense",
        space="queries" if moving else "scores",
    )
    _say(config.backend, execution, width)
    return execution


def gathering_pays(num_experts: int, top_k: int, width: int) -> bool:
    """Whether rows use so few of so wide a bank that dense products cost more.

    A dense product takes time in proportion to ``E D``, a gathered one to ``k (D + a constant)``;
    measured in ``benchmarks/LOG.md``.
    """
    return num_experts >= 8 * top_k and num_experts * width >= 1024 * top_k


def _moving_queries_pays(config: HiLoMoEConfig, width: int) -> bool:
    """Whether there are so many experts that their Gram matrix costs more than a wider query."""
    query_dim = config.query_dim or width
    return config.num_experts >= 32 and config.num_layers * config.num_experts >= 2 * query_dim


@cache
def _say(asked: str, execution: Execution, width: int) -> None:
    """Once per decision, not once per site; sites of other widths may be decided otherwise."""
    way = (
        "Triton kernels"
        if execution.backend == "triton"
        else f"experts {execution.experts}, {execution.space}"
    )
    _log.info(
        "HiLoMoE backend %r for sites of %d inputs: %s, %s", asked, width, execution.backend, way
    )


def _against_compiling(config: HiLoMoEConfig) -> tuple[str, ...]:
    against = []
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            against.append("torch.compile needs the package triton for CUDA; install it")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        against.append("torch.compile needs a C++ compiler; install g++ or set CXX")
    return tuple(against)


def _against_triton(config: HiLoMoEConfig) -> tuple[str, ...]:
    against = []
    if importlib.util.find_spec("triton") is None:
        against.append("the package triton is not installed")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        against.append("there is no CUDA device")
    vectors = config.num_layers * config.num_experts * config.rank
    if vectors > MOST_VECTORS:
        against.append(
            f"num_layers x num_experts x rank is {vectors}, and a block of rows holds no more than "
            f"{MOST_VECTORS} values a row"
        )
    return tuple(against)
