"""Pairs counted over all ranks, in bounded memory: a sort that is shared out by ranges of keys.

Each rank has sorted runs. Samples of all of them give borders, so that no range has many more rows
than fit into memory. Ranges are dealt to the ranks in turns: everybody sends the owner its rows of
the range, and the owner sorts them and counts. Equal keys never lie on both sides of a border, and
groups that do are joined at the end, so the result is exact whatever the borders are.

TorchRec's own ``AUCMetric`` cannot stand in for it: of equal predictions it counts whichever comes
first as the lower, so that four rows with one prediction have an AUC of 1 or of 0 by their order.
It also keeps the last rows of a window only, and gathers those of all ranks on every one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.training.metrics.definitions import count_pairs, Pairs
from torchrec_hilomoe.training.metrics.sorted_runs import Key, PredictionColumns, SortedRuns

__all__ = ["PairCounts", "count_over_ranks"]


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """What is known of all groups.

    Attributes:
        total: Sum of ``reduce`` over the groups that lay in one range.
        rest: Pairs of the other groups, each complete.
    """

    total: NDArray[np.float64]
    rest: Pairs


def count_over_ranks(
    sorted_runs: SortedRuns, capacity: int, reduce: Callable[[Pairs], NDArray[np.float64]]
) -> PairCounts:
    """Count the pairs inside each group; a collective call, with the same result on each rank.

    Args:
        sorted_runs: This rank's rows.
        capacity: Rows of all ranks that a rank can take at once.
        reduce: Turns complete groups into numbers that can be added up.
    """
    runs = sorted_runs.runs()
    borders = _borders(runs, capacity)
    size, rank = dist.get_world_size(), dist.get_rank()
    cuts = [[0, *(run.index(border) for border in borders), len(run)] for run in runs]
    ends: list[tuple[int, Pairs]] = []
    total = reduce(Pairs.concatenated([]))
    for first in range(0, len(borders) + 1, size):
        parcels = [
            PredictionColumns.concatenated(
                [
                    run.between(cut[at], cut[at + 1])
                    for run, cut in zip(runs, cuts, strict=True)
                    if at <= len(borders)
                ]
            )
            for at in range(first, first + size)
        ]
        mine = _exchange(parcels).sorted()
        pairs = count_pairs(mine.groups, mine.scores, mine.signed)
        total = total + reduce(pairs.inner())
        ends.append((first + rank, pairs.ends()))
    everybody: list[tuple[NDArray[np.float64], list[tuple[int, Pairs]]]] = [(total, ends)] * size
    dist.all_gather_object(everybody, (total, ends))
    in_order = sorted((item for _, part in everybody for item in part), key=lambda item: item[0])
    return PairCounts(
        total=np.sum([part for part, _ in everybody], axis=0),
        rest=Pairs.concatenated([pairs for _, pairs in in_order]).joined(),
    )


def _borders(runs: list[PredictionColumns], capacity: int) -> list[Key]:
    """Keys between which there are at most about ``capacity`` rows of all ranks, if distinct."""
    if dist.get_world_size() == 1 and sum(map(len, runs)) <= capacity // 2:
        return []
    counts: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(counts, [len(run) for run in runs])
    lengths = [length for part in counts for length in part]
    step = max(1, capacity // (8 * len(lengths)))
    samples: list[list[Key]] = [[]] * dist.get_world_size()
    dist.all_gather_object(samples, [key for run in runs for key in run.every(step)])
    keys = sorted(key for part in samples for key in part)
    ranges = max(dist.get_world_size(), -(-2 * sum(lengths) // capacity))
    picked = [keys[at * len(keys) // ranges] for at in range(1, ranges)] if keys else []
    return sorted(set(picked))


def _exchange(parcels: list[PredictionColumns]) -> PredictionColumns:
    """Send each rank its parcel; return what this one was sent."""
    if len(parcels) == 1:
        return parcels[0]
    packed = [_packed(parcel) for parcel in parcels]
    sizes = torch.tensor([len(part) for part in packed])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    received = torch.empty(int(coming.sum()), 3, dtype=torch.int64)
    dist.all_to_all_single(received, torch.cat(packed), coming.tolist(), sizes.tolist())
    return PredictionColumns(
        groups=received[:, 0].contiguous().numpy(),
        scores=_floats(received[:, 1]).astype(np.float32),
        signed=_floats(received[:, 2]),
    )


def _packed(columns: PredictionColumns) -> Tensor:
    words = [columns.groups]
    words += [part.astype(np.float64).view(np.int64) for part in (columns.scores, columns.signed)]
    return torch.from_numpy(np.stack(words, axis=1))


def _floats(words: Tensor) -> NDArray[np.float64]:
    return words.contiguous().numpy().view(np.float64)
