"""What must hold before anything is timed: the loop trains the right model, on any ranks."""

from dataclasses import replace
from itertools import cycle

import torch
from torch import distributed as dist
from torch import nn, Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.driving import assembled, check_same_state, copy_state, Driven
from benchmarks.random_batches import draw_batches, Stream
from benchmarks.rounding import of_sums
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.embeddings.sparse_arch import SparseArch
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import DistributedContext
from torchrec_hilomoe.training.checkpoint.state import CPUStager
from torchrec_hilomoe.training.inputs import pipelining_of
from torchrec_hilomoe.training.optimizers.precision import use_precision
from torchrec_hilomoe.training.stages.staging import share_statistics

__all__ = ["check_case"]

STEPS = 3
LARGEST_TABLE = 100_000  # rows: larger tables are cut for the check, which needs some copies
ROUNDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_case(config: RunConfig, stream: Stream, context: DistributedContext) -> None:
    """Refuse to time a loop that trains something else; a collective call.

    A few steps through the pipeline and as many one after the other, from equal tensors on equal
    batches, must end with equal tensors. Then the loss of the sharded model on all ranks' rows must
    be that of one process with whole tables.

    Raises:
        AssertionError: If either does not hold.
    """
    schema = _cut(stream.schema)
    stream = replace(stream, schema=schema)
    batches = _batches(config, stream, context, context.world.rank)
    piped, plain = (assembled(config, schema, context) for _ in range(2))
    copy_state(piped, plain)
    options = pipelining_of(config, schema)
    for assembly, how in ((piped, options), (plain, replace(options, debug=True))):
        torch.manual_seed(context.world.rank)
        driven = Driven(assembly, cycle(batches), options=how)
        for _ in range(STEPS):
            driven.step()
        driven.detach()
    check_same_state(piped, plain, bitwise=context.device.type == "cpu")
    _check_loss(config, stream, context, plain.model)


def _check_loss(
    config: RunConfig, stream: Stream, context: DistributedContext, model: DistributedModelParallel
) -> None:
    """Compare the sharded model's loss with one process's, over the first global batch."""
    share_statistics(model.module)
    model.eval()
    with torch.no_grad():
        _, output = model(_batches(config, stream, context, context.world.rank)[0])
    mean = output.loss.double().cpu().reshape(1) / context.world.size
    dist.all_reduce(mean)
    whole = _whole(config, stream.schema, context, model)
    if whole is None:
        return
    whole.eval()
    want = 0.0
    with torch.no_grad():
        for rank in range(context.world.size):
            _, alone = whole(_batches(config, stream, context, rank)[0])
            want += alone.loss.item() / context.world.size
    off = abs(mean.item() - want) / abs(want)
    # Each map rounds what it has summed up; the mean over rows is made in 32 bits.
    maps = sum(isinstance(module, nn.Linear) for module in whole.modules())
    allowed = of_sums(maps) * torch.finfo(ROUNDS[config.train.precision]).eps
    allowed += of_sums(config.train.batch_size) * torch.finfo(torch.float32).eps
    assert off <= allowed, (
        f"the loss over {context.world.size} ranks is {mean.item()}, and {want} in one process"
    )


def _whole(
    config: RunConfig, schema: Schema, context: DistributedContext, model: DistributedModelParallel
) -> TrainTask | None:
    """The same model with whole tables, on the first rank; a collective call."""
    state: dict[str, Tensor] = {}
    # A group of both gloo and NCCL gathers what lies in the hosts' memory.
    on_host = CPUStager().stage(model.state_dict())
    for name, value in model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            state[name] = value
            continue
        out = torch.empty(tuple(value.size())) if context.is_main else None
        on_host[name].gather(dst=0, out=out)
        if out is not None:
            state[name] = out
    if not context.is_main:
        return None
    task = build_task(config.model, schema)
    task.model.sparse = SparseArch(
        schema,
        config.model.embedding_dim,
        torch.device("cpu"),
        embed_dense=config.model.embed_dense,
    )
    task.load_state_dict(state)
    use_precision(task, config.train.precision, context.device)
    return task.to(context.device)


def _batches(
    config: RunConfig, stream: Stream, context: DistributedContext, rank: int
) -> list[CTRBatch]:
    return draw_batches(
        stream,
        STEPS,
        batch_size=config.train.batch_size,
        rank=rank,
        ranks=context.world.size,
        device=context.device,
    )


def _cut(schema: Schema) -> Schema:
    tables = {name: min(rows, LARGEST_TABLE) for name, rows in schema.tables.items()}
    return replace(schema, tables=tables)
