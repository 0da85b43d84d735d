"""What must hold before anything is timed: the loop trains the right model, on any ranks."""

from dataclasses import replace
from itertools import cycle

import torch
from torch import distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.driving import assembled, check_same_state, copy_state, Driven
from benchmarks.random_batches import draw_batches, Stream
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import Job
from torchrec_hilomoe.training.inputs import pipelining_of
from torchrec_hilomoe.training.optimizers.precision import use_precision
from torchrec_hilomoe.training.stages.staging import share_statistics

__all__ = ["check_case"]

STEPS = 3
LARGEST_TABLE = 100_000  # rows: larger tables are cut for the check, which needs some copies
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}  # of a mean over rows


def check_case(config: RunConfig, stream: Stream, job: Job) -> None:
    """Refuse to time a loop that trains something else; a collective call.

    A few steps through the pipeline and as many one after the other, from equal tensors on equal
    batches, must end with equal tensors. Then the loss of the sharded model on all ranks' rows must
    be that of one process with whole tables.

    Raises:
        AssertionError: If either does not hold.
    """
    schema = _cut(stream.schema)
    stream = replace(stream, schema=schema)
    batches = _batches(config, stream, job, job.world.rank)
    piped, plain = (assembled(config, schema, job) for _ in range(2))
    copy_state(piped, plain)
    options = pipelining_of(config, schema)
    for assembly, how in ((piped, options), (plain, replace(options, debug=True))):
        torch.manual_seed(job.world.rank)
        driven = Driven(assembly, cycle(batches), options=how)
        for _ in range(STEPS):
            driven.step()
        driven.detach()
    check_same_state(piped, plain, bitwise=job.device.type == "cpu")
    _check_loss(config, stream, job, plain.model)


def _check_loss(
    config: RunConfig, stream: Stream, job: Job, model: DistributedModelParallel
) -> None:
    """Compare the sharded model's loss with one process's, over the first global batch."""
    share_statistics(model.module)
    model.eval()
    with torch.no_grad():
        _, output = model(_batches(config, stream, job, job.world.rank)[0])
    mean = output.loss.double().cpu().reshape(1) / job.world.size
    dist.all_reduce(mean)
    whole = _whole(config, stream.schema, job, model)
    if whole is None:
        return
    whole.eval()
    want = 0.0
    with torch.no_grad():
        for rank in range(job.world.size):
            _, alone = whole(_batches(config, stream, job, rank)[0])
            want += alone.loss.item() / job.world.size
    off = abs(mean.item() - want) / abs(want)
    assert off <= TOLERANCE[config.train.precision], (
        f"the loss over {job.world.size} ranks is {mean.item()}, and {want} in one process"
    )


def _whole(
    config: RunConfig, schema: Schema, job: Job, model: DistributedModelParallel
) -> TrainTask | None:
    """The same model with whole tables, on the first rank; a collective call."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            state[name] = value
            continue
        out = torch.empty(tuple(value.size()), device=job.device) if job.is_main else None
        value.gather(dst=0, out=out)
        if out is not None:
            state[name] = out
    if not job.is_main:
        return None
    task = build_task(config.model, schema)
    task.model.sparse = SparseArch(
        schema,
        config.model.embedding_dim,
        torch.device("cpu"),
        embed_dense=config.model.embed_dense,
    )
    task.load_state_dict(state)
    use_precision(task, config.train.precision, job.device)
    return task.to(job.device)


def _batches(config: RunConfig, stream: Stream, job: Job, rank: int) -> list[CTRBatch]:
    return draw_batches(
        stream,
        STEPS,
        batch_size=config.train.batch_size,
        rank=rank,
        ranks=job.world.size,
        device=job.device,
    )


def _cut(schema: Schema) -> Schema:
    tables = {name: min(rows, LARGEST_TABLE) for name, rows in schema.tables.items()}
    return replace(schema, tables=tables)
