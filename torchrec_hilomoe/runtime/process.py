"""What this process runs on, and how much memory it has needed."""

import platform
import re
import resource
import sys
from pathlib import Path

import torch
import torchrec

from torchrec_hilomoe import __version__

__all__ = ["peak_memory_gib", "peak_resident_bytes", "versions"]


def versions() -> dict[str, str]:
    """Name to version; this package's also where it runs from its sources, not installed."""
    return {
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "torchrec-hilomoe": __version__,
        "python": platform.python_version(),
    }


STATUS = Path("/proc/self/status")


def peak_memory_gib() -> float:
    """Return the most that was in use at once: on the GPU if there is one, else in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held at once, with its libraries.

    Linux starts the figure of ``getrusage`` with the memory of whoever started the process, so it
    is asked elsewhere where it can be.
    """
    text = STATUS.read_text() if STATUS.exists() else ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", text, re.M):
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
