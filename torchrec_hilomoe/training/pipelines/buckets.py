"""DDP's buckets, settled before the first step, so that a resumed run adds up in the same order."""

import torch
from torch import distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.models.train_task import TrainTask

__all__ = ["settle_buckets"]

# Of two numbers there is one sum, whichever comes first.
ORDER_MATTERS_ABOVE = 2

# With a static graph DDP only counts in the first pass, and notes the order in the second.
PASSES = 2


def settle_buckets(model: DistributedModelParallel, batch: CTRBatch) -> None:
    """Make the first backward passes for nothing; a collective call.

    DDP gathers gradients in buckets, and after its first passes gathers them anew, in the order in
    which they came. The order in which ranks are added up depends on where in its bucket an
    element lies, so the first steps after wrapping round differently from the same steps in the
    middle of a stage. Here those passes leave no trace: no table learns from them, and random
    state and running statistics are put back.

    Args:
        model: Wrapped for its stage, not yet pipelined.
        batch: Any; it is not consumed.
    """
    task = model.module
    assert isinstance(task, TrainTask)
    tables = set(task.model.sparse.tables)
    learning = [p for p in task.parameters() if p.requires_grad and p not in tables]
    if dist.get_world_size() <= ORDER_MATTERS_ABOVE or not learning:
        return
    on_gpu = [model.device] if model.device.type == "cuda" else []
    statistics = [(buffer, buffer.clone()) for buffer in task.model.backbone.buffers()]
    frozen, task.model.sparse.frozen = task.model.sparse.frozen, True
    with torch.random.fork_rng(devices=on_gpu):
        for _ in range(PASSES):
            loss, _ = model(batch.to(model.device))
            loss.backward()
    task.model.sparse.frozen = frozen
    with torch.no_grad():
        for buffer, before in statistics:
            buffer.copy_(before)
    for parameter in learning:
        parameter.grad = None
