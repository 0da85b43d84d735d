"""How much memory this process has needed."""

import resource

import torch

__all__ = ["peak_memory_gib"]


def peak_memory_gib() -> float:
    """Return the most that was in use at once: on the GPU if there is one, else in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
