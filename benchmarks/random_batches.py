"""Random batches of any schema, made on the device, so that no loader is measured.

Shape legend:
    B  rows
    K  ids of one feature, all rows together
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.schema import IdFeature, PooledFeature, Schema, SequenceGroup

__all__ = ["Stream", "click_log", "draw", "draw_batches", "draw_lengths"]

NOW, YEAR = 1_700_000_000, 31_536_000


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What random rows are like.

    Attributes:
        schema: Their columns.
        mean_length: Ids of a list, on average; where a list holds no more than that, it is full.
        skew: Ids are ``rows · u^skew`` of an even ``u``: 1 draws all alike, more draws low ones
            more often.
    """

    schema: Schema
    mean_length: float
    skew: float = 1.0


def click_log(items: int, max_length: int) -> Schema:
    """The columns of a small click log: item and category, their history, a user, an hour."""
    names = ("item", "category")
    return Schema(
        dataset="random",
        tables={"item": items, "category": 1000, "user": items, "hour": 25},
        candidate=tuple(IdFeature(name=name, table=name) for name in names),
        sequences=(
            SequenceGroup(
                name="history",
                fields=tuple(IdFeature(name=f"{name}_history", table=name) for name in names),
                max_length=max_length,
            ),
        ),
        pooled=(
            PooledFeature(name="user", table="user"),
            PooledFeature(name="hour", table="hour"),
        ),
        dense=("price", "age"),
    )


def draw_batches(
    stream: Stream, count: int, *, batch_size: int, rank: int, ranks: int, device: torch.device
) -> list[CTRBatch]:
    """Return a rank's share of ``count`` global batches; what it is depends on nothing else."""
    first, last = (batch_size * place // ranks for place in (rank, rank + 1))
    batches = []
    for index in range(count):
        rng = torch.Generator(device).manual_seed(index * 1_000_003 + rank)
        batches.append(draw(stream, last - first, rng, loss_denominator=batch_size / ranks))
    return batches


def draw(
    stream: Stream, rows: int, rng: torch.Generator, *, loss_denominator: float | None = None
) -> CTRBatch:
    """Return a batch, on the generator's device, as a loader would give it.

    Args:
        stream: What its rows are like.
        rows: At least 1.
        rng: Where numbers come from.
        loss_denominator: See :class:`CTRBatch`; all of them by default.
    """
    schema, device = stream.schema, rng.device

    def ids_K(feature: IdFeature | PooledFeature, count: int) -> Tensor:
        size = schema.tables[feature.table]
        share_K = torch.rand(count, generator=rng, device=device, dtype=torch.float64)
        first = min(1, size - 1)  # 0 is padding
        return (first + (share_K**stream.skew * (size - first)).long()).clamp_(max=size - 1)

    ones_B = torch.ones(rows, dtype=torch.int32, device=device)
    lengths = [ones_B for _ in schema.candidate]
    values = [ids_K(field, rows) for field in schema.candidate]
    longest_B, times = torch.zeros_like(ones_B), []
    for group in schema.sequences:
        lengths_B = draw_lengths(rows, stream.mean_length, group.max_length, rng)
        longest_B = torch.maximum(longest_B, lengths_B)
        total = int(lengths_B.sum())
        lengths += [lengths_B for _ in group.fields]
        values += [ids_K(field, total) for field in group.fields]
        if group.time is not None:
            times.append(NOW - torch.randint(YEAR, (total,), generator=rng, device=device))
    bags = [
        ones_B
        if feature.max_length == 1
        else draw_lengths(rows, stream.mean_length, feature.max_length, rng)
        for feature in schema.pooled
    ]
    bagged = [ids_K(f, int(bag.sum())) for f, bag in zip(schema.pooled, bags, strict=True)]
    if not schema.sequences:  # the candidate is looked up among the pooled
        bagged, bags, values, lengths = [*values, *bagged], [*lengths, *bags], [], []
    dense = len(schema.dense)
    return CTRBatch(
        pooled=_jagged(schema.pooled_keys, bagged, bags, ones_B),
        unpooled=_jagged(schema.unpooled_keys, values, lengths, ones_B),
        dense=torch.randn(rows, dense, generator=rng, device=device),
        labels=torch.randint(2, (rows,), generator=rng, device=device).float(),
        weights=torch.ones(rows, device=device),
        grouping_keys=torch.randint(rows, (rows,), generator=rng, device=device),
        max_seqlen=max(1, int(longest_B.max())),
        loss_denominator=float(rows) if loss_denominator is None else loss_denominator,
        position=LoaderState(epoch=0, lane_rows=0, num_canonical_shards=1),
        num_tokens=int(longest_B.sum()),
        time=torch.full((rows,), NOW, device=device) if schema.time is not None else None,
        times=tuple(times),
    )


def draw_lengths(rows: int, mean: float, max_seqlen: int, rng: torch.Generator) -> Tensor:
    """Return the lengths of lists ``(B,)``: full, or exponential about ``mean``, but never empty.

    What is cut off at the longest makes the true mean a little smaller.
    """
    if mean >= max_seqlen:
        return torch.full((rows,), max_seqlen, dtype=torch.int32, device=rng.device)
    share_B = torch.rand(rows, generator=rng, device=rng.device).clamp(min=1e-6)
    return (-mean * share_B.log()).int().clamp(1, max_seqlen)


def _jagged(
    keys: Sequence[str], values: Sequence[Tensor], lengths: Sequence[Tensor], ones_B: Tensor
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.cat([ones_B.new_empty(0, dtype=torch.int64), *values]),
        lengths=torch.cat([ones_B[:0], *lengths]),
        stride=len(ones_B),
        length_per_key=[len(of_key) for of_key in values],  # asked later, it would wait
    )
