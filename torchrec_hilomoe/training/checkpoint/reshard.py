"""Row-wise optimizer state of tables that are now cut into other columns.

Row-wise Adagrad adds up, for each row, the mean of its squared gradients. Of a table that is cut by
columns it keeps one such sum for each piece, over the columns of that piece alone: the state has
another size where the cut is another. A piece made of several has the mean of theirs, weighted by
their columns, which is what it would have added up itself; a piece out of a wider one takes that
one's sum, as nobody knows how it was spread.

Shape legend:
    R  rows     P  pieces in the checkpoint     Q  pieces here
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = [
    "ReshardedState",
    "find_resharded_states",
    "load_resharded_state",
    "reshard_rowwise_state",
]

STATE, WEIGHT = "optimizer.state.tables.", "model."
ColumnRange = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ReshardedState:
    """Row-wise state of a table whose columns are sharded in another way than in the checkpoint.

    Attributes:
        name: Name of the tensor.
        rows: Rows of the table.
        before: ColumnRange of each piece in the checkpoint: the first, and the one after the last.
        after: ColumnRange of each piece here.
    """

    name: str
    rows: int
    before: Sequence[ColumnRange]
    after: Sequence[ColumnRange]


def find_resharded_states(
    metadata: Metadata, flat: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]
) -> list[ReshardedState]:
    """Return the states that must be resharded, in the same order on every rank.

    Args:
        metadata: The checkpoint's index.
        flat: This rank's tensors by name, every table among them.
        sizes: Of the tensors that the ranks hold together.
    """
    entries, found = metadata.state_dict_metadata, []
    for name in sorted(sizes):
        # A table's state is named after its weight, with the table's name once more.
        weight_name = WEIGHT + name.removeprefix(STATE).rpartition(".")[0].rpartition(".")[0]
        saved, saved_weight = entries.get(name), entries.get(weight_name)
        weight = flat.get(weight_name)
        if not (
            name.startswith(STATE)
            and isinstance(saved, TensorStorageMetadata)
            and isinstance(saved_weight, TensorStorageMetadata)
            and isinstance(weight, ShardedTensor)
            and tuple(saved_weight.size) == tuple(weight.size())
        ):
            continue
        rows = weight.size(0)
        before = _column_ranges((part.offsets[1], part.sizes[1]) for part in saved_weight.chunks)
        after = _column_ranges(
            (part.shard_offsets[1], part.shard_sizes[1])
            for part in weight.metadata().shards_metadata
        )
        fits = tuple(saved.size) == (rows * len(before),) and sizes[name] == (rows * len(after),)
        if fits and before != after:
            found.append(ReshardedState(name=name, rows=rows, before=before, after=after))
    return found


def load_resharded_state(
    resharded: ReshardedState, state: ShardedTensor | None, reader: dcp.StorageReader
) -> None:
    """Fill this rank's part of one state; a collective call.

    Args:
        resharded: The state.
        state: What is filled; None where this rank has no part of it.
        reader: Of the checkpoint.
    """
    if state is None:
        dcp.load({}, storage_reader=reader)
        return
    saved_PR = torch.empty(
        len(resharded.before), resharded.rows, dtype=state.metadata().tensor_properties.dtype
    )
    dcp.load({resharded.name: saved_PR.view(-1)}, storage_reader=reader)
    for shard in state.local_shards():
        piece, row = divmod(shard.metadata.shard_offsets[0], resharded.rows)
        rows = saved_PR[:, row : row + shard.metadata.shard_sizes[0]]
        shard.tensor.copy_(
            reshard_rowwise_state(rows, resharded.before, resharded.after[piece]).view_as(
                shard.tensor
            )
        )


def reshard_rowwise_state(
    saved_PR: Tensor, before: Sequence[ColumnRange], piece: ColumnRange
) -> Tensor:
    """Return the sums of a piece, ``(R,)``, from those of the pieces that it overlaps.

    Example:
        >>> saved_PR = torch.tensor([[2.0], [4.0]])
        >>> before = [(0, 4), (4, 8)]
        >>> [reshard_rowwise_state(saved_PR, before, piece) for piece in ((0, 8), (4, 6))]
        [tensor([3.]), tensor([4.])]
    """
    start, stop = piece
    shares = [max(0, min(stop, end) - max(start, begin)) / (stop - start) for begin, end in before]
    return torch.tensor(shares, dtype=saved_PR.dtype) @ saved_PR


def _column_ranges(parts: Iterable[tuple[int, int]]) -> tuple[ColumnRange, ...]:
    return tuple(sorted({(start, start + width) for start, width in parts}))
