"""Rows of a site, put into buckets, and their sums by bucket.

Shape legend: as in `interactions`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import nn, Tensor

__all__ = [
    "SMALL",
    "BucketRows",
    "Buckets",
    "bucket_sums",
    "joined",
    "joint_weights",
    "one_hot",
    "sums_of",
]

SMALL = 2**10  # numbers of an outer product that is sooner made whole than bucket by bucket


@dataclass(frozen=True, kw_only=True)
class BucketRows:
    """Rows of a site in one backward pass.

    Attributes:
        x_ND: Inputs.
        delta_NO: Gradients of each row's own loss, times its weight.
        weight_N: Weights, above 0.
        buckets: Where each unit puts each row.
        sample_N: Whose each row is; None where a row is a sample.
        samples: Of how many samples the rows are.
    """

    x_ND: Tensor
    delta_NO: Tensor
    weight_N: Tensor
    buckets: "Buckets"
    sample_N: Tensor | None = None
    samples: int = 0

    def sketched(self, width: int, seed: int) -> "BucketRows":
        """Project both sides at random to ``width``, the same way for all rows, if wider."""
        x_ND = _projected(self.x_ND, width, seed + 1)
        return replace(self, x_ND=x_ND, delta_NO=_projected(self.delta_NO, width, seed + 2))

    def every(self, step: int, first: int) -> "BucketRows":
        """Keep one row of ``step``, from row ``first`` on."""
        return self.at(slice(first, None, step))

    def at(self, rows: slice | Tensor) -> "BucketRows":
        """Keep some rows, by their indices or a mask."""
        return replace(
            self,
            x_ND=self.x_ND[rows],
            delta_NO=self.delta_NO[rows],
            weight_N=self.weight_N[rows],
            buckets=self.buckets.at(rows),
            sample_N=None if self.sample_N is None else self.sample_N[rows],
        )


def joined(calls: Sequence[BucketRows]) -> BucketRows:
    """The rows of all calls of a site in one pass; of several, a sample has a row in each."""
    if len(calls) == 1:
        return calls[0]
    samples = [torch.arange(len(it.x_ND), device=it.x_ND.device) for it in calls]
    samples = [
        own if it.sample_N is None else it.sample_N for own, it in zip(samples, calls, strict=True)
    ]
    return replace(
        calls[0],
        x_ND=torch.cat([it.x_ND for it in calls]),
        delta_NO=torch.cat([it.delta_NO for it in calls]),
        weight_N=torch.cat([it.weight_N for it in calls]),
        buckets=Buckets(
            torch.cat([it.buckets.bucket_KN for it in calls], dim=1), calls[0].buckets.experts
        ),
        sample_N=torch.cat(samples),
    )


def _projected(values_NW: Tensor, width: int, seed: int) -> Tensor:
    W = values_NW.shape[1]
    return values_NW if width >= W else values_NW @ _projection(W, width, seed).to(values_NW)


@lru_cache(maxsize=64)
def _projection(W: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(W, width, generator=generator) / math.sqrt(width)


def sums_of(rows: BucketRows) -> tuple[Tensor, ...]:
    """What the rows of a pass add to `FitSums.tensors`."""
    x_ND, delta_NO, weight_N1 = rows.x_ND, rows.delta_NO, rows.weight_N[:, None]
    return (
        *bucket_sums(rows),
        (x_ND * weight_N1).t() @ x_ND,
        delta_NO.t() @ (delta_NO / weight_N1),
        x_ND.new_tensor([len(x_ND)]),
    )


def bucket_sums(rows: BucketRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By bucket, ``(K, E, ...)``: weights, sums of ``x``, of ``delta``, and of ``delta x^T``."""
    x_ND, delta_NO, weight_N1 = rows.x_ND, rows.delta_NO, rows.weight_N[:, None]
    D, width = x_ND.shape[1], delta_NO.shape[1]
    sums_KEW = rows.buckets.sums(torch.cat([weight_N1, x_ND * weight_N1, delta_NO], dim=1))
    weight_KE1, x_KED, delta_KEO = sums_KEW.split([1, D, width], dim=2)
    if width * D <= SMALL:
        outer_NW = (delta_NO.unsqueeze(2) * x_ND.unsqueeze(1)).flatten(1)
        product_KEOD = rows.buckets.sums(outer_NW).unflatten(2, (width, D))
    else:
        product_KEOD = rows.buckets.products(delta_NO, x_ND)
    return weight_KE1.squeeze(2), x_KED, delta_KEO, product_KEOD


def joint_weights(rows: BucketRows) -> Tensor:
    """``(C, C)``, the weight of the rows that two buckets have in common."""
    hot_KEN = one_hot(rows.buckets, rows.x_ND.dtype)
    heavy_NC = (hot_KEN * rows.weight_N).flatten(0, 1).t()
    return rows.buckets.sums(heavy_NC.contiguous()).flatten(0, 1)


class Buckets:
    """Into which bucket each unit puts each row.

    Sums by bucket read each row once a unit, where products with one-hot rows do ``E`` times: rows
    are put in the order of their buckets first, once for all who share this object.

    Args:
        bucket_KN: The buckets, below ``experts``.
        experts: ``E``.

    Attributes:
        bucket_KN: As given.
        experts: As given.
    """

    def __init__(self, bucket_KN: Tensor, experts: int) -> None:
        self.bucket_KN, self.experts = bucket_KN, experts

    def __len__(self) -> int:
        """``K``."""
        return len(self.bucket_KN)

    def at(self, rows: slice | Tensor) -> "Buckets":
        """Those of some rows, by their indices or a mask."""
        return Buckets(self.bucket_KN[:, rows], self.experts)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """``(M,)``, rows by unit and bucket, and ``(C,)``, where each bucket's begin."""
        K, N = self.bucket_KN.shape
        sorted_KN, row_KN = self.bucket_KN.sort(dim=1, stable=True)
        expert_E = torch.arange(self.experts, dtype=sorted_KN.dtype, device=row_KN.device)
        start_KE = torch.searchsorted(sorted_KN, expert_E.repeat(K, 1))
        start_KE += N * torch.arange(K, device=row_KN.device).unsqueeze(1)
        return row_KN.flatten(), start_KE.flatten()

    def sums(self, values_NW: Tensor) -> Tensor:
        """``(K, E, W)``, by bucket."""
        row_M, start_C = self._order
        sums_CW = nn.functional.embedding_bag(row_M, values_NW, start_C, mode="sum")
        return sums_CW.unflatten(0, (len(self), self.experts))

    def products(self, left_NO: Tensor, right_ND: Tensor) -> Tensor:
        """``(K, E, O, D)``, by bucket, where outer products of all rows would be too many."""
        row_M, start_C = self._order
        stops_C = [*start_C[1:].tolist(), len(row_M)]
        sizes = [stop - start for start, stop in zip([0, *stops_C], stops_C, strict=False)]
        # One gather is much faster than one for each bucket.
        lefts = left_NO.index_select(0, row_M).split(sizes)
        rights = right_ND.index_select(0, row_M).split(sizes)
        product_COD = left_NO.new_empty(len(sizes), left_NO.shape[1], right_ND.shape[1])
        for left_nO, right_nD, product_OD in zip(lefts, rights, product_COD.unbind(), strict=True):
            torch.mm(left_nO.t(), right_nD, out=product_OD)
        return product_COD.unflatten(0, (len(self), self.experts))


def one_hot(buckets: Buckets, dtype: torch.dtype) -> Tensor:
    """``(K, E, N)``, 1 where a row is in a bucket."""
    bucket_K1N = buckets.bucket_KN.unsqueeze(1)
    expert_E1 = torch.arange(buckets.experts, device=bucket_K1N.device).unsqueeze(1)
    return (bucket_K1N == expert_E1).to(dtype)
