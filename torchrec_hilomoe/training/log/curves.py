"""A run as curves in TensorBoard, if it is installed."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torchrec_hilomoe.training.log.routing import LayerLoad

__all__ = ["Curves", "finite"]

logger = logging.getLogger(__name__)

DRAWN_EXPERTS = 16  # more curves than that nobody can tell apart


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...
    def close(self) -> None: ...


class Curves:
    """Draws numbers over steps.

    Args:
        folder: Where TensorBoard looks.
        start: Steps from this one on are drawn anew.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self._writer = _writer(folder, start)

    def numbers(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Draw those that are numbers."""
        for name, value in values.items():
            if self._writer is not None and finite(value) is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a remark."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def load(self, load: LayerLoad, step: int) -> None:
        """Draw what a router did."""
        largest = {"entropy": load.entropy, "largest_load": max(load.load)}
        dead = {"dead_experts": sum(share == 0 for share in load.load)}
        each = enumerate(load.load) if len(load.load) <= DRAWN_EXPERTS else ()
        loads = {f"load/{expert}": share for expert, share in each}
        self.numbers(f"router/{load.site}/layer{load.layer}", {**largest, **dead, **loads}, step)

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


def finite(value: Any) -> Any:
    """Return a value that JSON and curves can show; None where it is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _writer(folder: Path, start: int) -> _Writer | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so %s is not written; "
            "pip install 'torchrec-hilomoe[tensorboard]'",
            folder,
        )
        return None
    return SummaryWriter(str(folder), purge_step=start)
