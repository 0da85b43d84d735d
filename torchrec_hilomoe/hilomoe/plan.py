"""How a site computes: decided when it is built, logged once, refused with every reason.

``"auto"`` means eager. The compiled form of the same function fuses the work between the products,
which pays where they are small (``benchmarks/LOG.md``), but takes a compiler and a minute of it at
the first batch, so it is for the user to ask for.
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
from torchrec_hilomoe.hilomoe.experts import gathering_pays

__all__ = ["Plan", "plan_for"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a site computes.

    Attributes:
        compiled: Whether its function goes through ``torch.compile``.
        experts: How rows meet the vectors that they chose; see `experts`.
        space: Where the layers' recursion runs; see `routing` and `query_space`.
    """

    compiled: bool
    space: Literal["scores", "queries"]
    experts: Literal["dense", "gathered", "indexed"]


def plan_for(config: HiLoMoEConfig, width: int) -> Plan:
    """Decide how a site of this width computes.

    Raises:
        ValueError: If the configuration asks for a backend that cannot be had here.
    """
    reasons = {"compiled": _against_compiling, "triton": _against_triton}
    against = reasons[config.backend]() if config.backend in reasons else ()
    if against:
        raise ValueError(
            f"HiLoMoEConfig.backend = {config.backend!r} cannot be used here: "
            f"{'; '.join(against)}. Use backend='auto' or 'eager'."
        )
    compiled = config.backend == "compiled"
    gathered = gathering_pays(config.num_experts, config.top_k, width)
    plan = Plan(
        compiled=compiled,
        experts="indexed" if compiled else "gathered" if gathered else "dense",
        space="queries" if not compiled and _moving_queries_pays(config, width) else "scores",
    )
    _say(config.backend, plan)
    return plan


def _moving_queries_pays(config: HiLoMoEConfig, width: int) -> bool:
    """Whether there are so many experts that their Gram matrix costs more than a wider query."""
    query_dim = config.query_dim or width
    return config.num_experts >= 32 and config.num_layers * config.num_experts >= 2 * query_dim


@cache
def _say(asked: str, plan: Plan) -> None:
    """Once per decision, not once per site."""
    backend = "compiled" if plan.compiled else "eager"
    _log.info("HiLoMoE backend %r: %s, experts %s, %s", asked, backend, plan.experts, plan.space)


def _against_compiling() -> tuple[str, ...]:
    against = []
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            against.append("torch.compile needs the package triton for CUDA; install it")
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        against.append("torch.compile needs a C++ compiler; install g++ or set CXX")
    return tuple(against)


def _against_triton() -> tuple[str, ...]:
    against = ["this version has no Triton kernels"]
    if not torch.cuda.is_available():
        against.append("there is no CUDA device")
    if importlib.util.find_spec("triton") is None:
        against.append("the package triton is not installed")
    return tuple(against)
