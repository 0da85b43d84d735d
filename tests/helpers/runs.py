"""Small whole runs for tests, and what their checkpoints hold."""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from tests.helpers.processes import run_ranks
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.runtime.distributed import join
from torchrec_hilomoe.training.run import run_training

__all__ = ["SMALL", "read_tensors", "train"]

# Every stage has a step or more: 1 to 6, then one a layer, then the rest.
SMALL = (
    "--train.max_steps=18",
    "--train.batch_size=64",
    "--train.backbone_share=0.3",
    "--train.frozen_share=0.34",
    "--train.warmup_steps=4",
    "--train.log_every=4",
    "--data.train_rows=4096",
    "--data.eval_rows=512",
    "--model.dropout=0.1",
    "--checkpoint.keep=20",
)


def train(out: Path, *overrides: str, ranks: int = 1) -> None:
    """Train a small run to its end in processes of its own, as ``apps/train.py`` does."""
    run_ranks(_train, ranks, [*SMALL, f"--out_dir={out}", *overrides], joined=False)


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by name."""
    reader = dcp.FileSystemReader(checkpoint)
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # says it is one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _train(argv: list[str]) -> None:
    parsed = parse_run(argv)
    with join("cpu") as job:
        run_training(parsed, job)
