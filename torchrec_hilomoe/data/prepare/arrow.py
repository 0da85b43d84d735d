"""Arrow's functions by name: those of ``pyarrow.compute`` are made at run time, unseen by types."""

from typing import Any

import pyarrow.compute as pc

__all__ = ["call"]


def call(function: str, *values: Any, options: pc.FunctionOptions | None = None) -> Any:
    """Call a function of ``pyarrow.compute``; plain Python values are made scalars."""
    return pc.call_function(function, list(values), options)
