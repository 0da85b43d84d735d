"""Small checkpoints: some tensors, where a run stands, and a way to save and load them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchrec_hilomoe.data.batch import LoaderState
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Best, Progress, Saver

__all__ = ["progress", "save", "state", "tensors"]


def state(fill: float = 1.0) -> dict[str, Any]:
    """Nested tensors of several types and shapes."""
    return {
        "model": {
            "weight": torch.full((3, 5), fill),
            "half": torch.full((2,), fill, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
        },
        "optimizer": {"state": {"weight.step": torch.tensor(fill)}},
    }


def progress(step: int = 1, best: int | None = None) -> Progress:
    """Where a run stands, and which step was its best."""
    return Progress(
        step=step,
        stage="expert_warmup[2]",
        position=LoaderState(epoch=2, lane_rows=30, num_canonical_shards=8),
        total_steps=20,
        best=None if best is None else Best(metric="auc", value=0.625, step=best),
        schedule={"ended": {"backbone_warmup": 3}, "waited": 1},
    )


def save(
    folder: Path | str,
    step: int = 1,
    *,
    tensors: Mapping[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    keep: int = 3,
) -> str:
    """Save one checkpoint and return its path."""
    saver = Saver(folder, keep=keep, documents=documents)
    saver.save(tensors or state(float(step)), progress(step))
    found = checkpoint.latest(folder)
    assert found is not None
    return found


def tensors(nested: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    """Every tensor, in order."""
    return [
        tensor
        for value in nested.values()
        for tensor in (tensors(value) if isinstance(value, dict) else [value])
    ]
