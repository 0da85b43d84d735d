"""What trains on: random batches that lie on the device, or the product's loader over files."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import distributed as dist

from benchmarks.random_batches import draw, draw_batches, Stream
from torchrec_hilomoe.config import RunConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.data.prepare.folder import prepared_folder
from torchrec_hilomoe.runtime.distributed import broadcast_text, DistributedContext
from torchrec_hilomoe.training.inputs import loader_of

__all__ = ["READY", "loaded", "ready", "table_of", "write_folder"]

READY = 8  # batches that lie ready: a round of steps is a multiple of it
FEWEST_ROWS = 65_536  # of files


def ready(stream: Stream, batch_size: int, context: DistributedContext) -> Iterator[CTRBatch]:
    """Batches on the device, the same few again and again."""
    world = context.world
    return cycle(
        draw_batches(
            stream,
            READY,
            batch_size=batch_size,
            rank=world.rank,
            ranks=world.size,
            device=context.device,
        )
    )


@contextmanager
def loaded(
    config: RunConfig, stream: Stream, context: DistributedContext, scratch: Path | None
) -> Iterator[Iterator[CTRBatch]]:
    """The product's loader: over the folder of a run, or else over files of random rows.

    Args:
        config: The run.
        stream: What random rows are like.
        context: Its ranks, all of which read the same files.
        scratch: Where files are written, for as long as they are read; None is a folder for what
            is temporary on this host.
    """
    with _folder_of(config, stream, context, scratch) as folder:
        own = replace(config, data=replace(config.data, path=folder, data_schema=None))
        with closing(iter(loader_of(own, "train", context.world))) as batches:
            yield batches


@contextmanager
def _folder_of(
    config: RunConfig, stream: Stream, context: DistributedContext, scratch: Path | None
) -> Iterator[str]:
    if config.data.path is not None:
        yield config.data.path
        return
    if scratch is not None and context.is_main:
        scratch.mkdir(parents=True, exist_ok=True)
    holder = tempfile.TemporaryDirectory(dir=scratch) if context.is_main else None
    try:
        folder = broadcast_text(f"{holder.name}/random" if holder else None)
        if context.is_main:
            write_folder(folder, stream, max(FEWEST_ROWS, 4 * config.train.batch_size))
        dist.barrier()
        yield folder
        dist.barrier()
    finally:
        if holder is not None:
            holder.cleanup()


def write_folder(folder: str, stream: Stream, rows: int) -> None:
    """Write random rows as a prepared folder with a training split."""

    def make(start: int, stop: int) -> pa.Table:
        rng = torch.Generator().manual_seed(start)
        # Where no row is asked for, its columns are.
        return table_of(stream, draw(stream, max(1, stop - start), rng)).slice(0, stop - start)

    with prepared_folder(folder, overwrite=False) as out:
        out.write_schema(stream.schema)
        out.write_split("train", rows, make, label=stream.schema.label)


def table_of(stream: Stream, batch: CTRBatch) -> pa.Table:
    """Return a batch's rows as columns of a file."""
    schema = stream.schema
    lists = {field.name for field in schema.sequence_fields}
    lists |= {feature.name for feature in schema.pooled if feature.max_length > 1}
    columns: dict[str, pa.Array] = {}
    for jagged in (batch.unpooled, batch.pooled):
        for key in jagged.keys():  # noqa: SIM118  # TorchRec's, no mapping
            values = jagged[key].values().numpy()
            is_list = key in lists
            columns[key] = _list(values, jagged[key].lengths()) if is_list else pa.array(values)
    timed = [group for group in schema.sequences if group.time is not None]
    for group, times in zip(timed, batch.times, strict=True):
        assert group.time is not None
        lengths = batch.unpooled[group.fields[0].name].lengths()
        columns[group.time] = _list(times.numpy(), lengths)
    dense = zip(schema.dense, batch.dense.numpy().T, strict=True)
    columns |= {name: pa.array(values) for name, values in dense}
    if schema.group not in columns:
        columns[schema.group] = pa.array(batch.grouping_keys.numpy())
    if schema.time is not None and batch.time is not None:
        columns[schema.time] = pa.array(batch.time.numpy())
    if schema.weight is not None:
        columns[schema.weight] = pa.array(batch.weights.numpy())
    columns[schema.label] = pa.array(batch.labels.numpy().astype(np.int8))
    return pa.table(columns)


def _list(values: np.ndarray, lengths: torch.Tensor) -> pa.Array:
    offsets = np.concatenate([[0], lengths.numpy().cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
