"""What a checkpoint can be wrong with, and how DCP's own report of it is shortened."""

from torch.distributed import checkpoint as dcp

__all__ = ["CheckpointError", "cause_of"]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged, or not this run's; or cannot be written."""


def cause_of(error: BaseException) -> str:
    """Return one line: DCP's own errors carry every rank's traceback."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
    return str(error)
