"""The public FuxiCTR package, the oracle for parity; where it is absent, tests that ask it skip."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

__all__ = ["fuxictr_layers", "fuxictr_model"]

# What its preprocessing imports of ray, a cluster's worth of packages that no model needs.
RAY = {
    "ray": (),
    "ray.data": ("SaveMode", "TaskPoolStrategy"),
    "ray.data.datasource": (),
    "ray.data.datasource.filename_provider": ("FilenameProvider",),
}


def fuxictr_model(name: str) -> type[Any]:
    """One of the wheel's long-sequence models, such as ``DIN``."""
    return getattr(_imported(f"model_zoo.LongCTR.{name}"), name)


def fuxictr_layers() -> ModuleType:
    """The layers that its models share."""
    return _imported("fuxictr.pytorch.layers")


def _imported(module: str) -> ModuleType:
    pytest.importorskip("fuxictr", reason="pip install --no-deps -r requirements/dev.txt")
    for name, attributes in RAY.items():
        empty = ModuleType(name)
        for attribute in attributes:
            setattr(empty, attribute, object)
        sys.modules.setdefault(name, empty)
    with warnings.catch_warnings(action="ignore"):  # its own, at import
        return import_module(module)
