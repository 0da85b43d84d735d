"""What experts at a site would gain if they were routed by a feature: sums, and what they say.

At a trained plain model the mean of ``delta x^T`` is zero: ``x`` is a site's input and ``delta``
the gradient of a row's loss by the site's output. Over the rows of one *bucket*, rows that a router
sends to the same expert, it is not, if what defines the bucket changes what the map should be.
`FitSums` finds for each bucket the step of low rank that pays most, from some rows; `HeldOutSums`
finds from others what these steps bring. `reference.interaction_gain` is the same as loops.

A *unit* is one way to put rows into buckets: a feature with one draw of keys. Sums are in float64;
products of one batch are in the dtype of the model, float32 at least.

Shape legend:
    N  rows     D  input width     O  output width     E  experts, and buckets     R  rank
    K  units    S  blocks of held-out rows             M  rows of all units, K N
    C  buckets of all units, K E
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import Tensor

from torchrec_hilomoe.hilomoe.probe.rows import (
    bucket_sums,
    BucketRows,
    joint_weights,
    one_hot,
    SMALL,
    sums_of,
)
from torchrec_hilomoe.hilomoe.ranks import process_group_of, RankGroup, size_of

__all__ = [
    "Directions",
    "FitSums",
    "HeldOutSums",
    "Statistics",
    "add_over_ranks",
    "inverse_root",
    "signed_gain",
]

KEPT = 1e-3  # eigenvalues below this share of the largest are noise, not width
CHUNK = 2**22  # numbers of a temporary of held-out rows


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The steps that experts would take, ``T_e`` of each unit and bucket.

    Attributes:
        left_KERO: Left factors, whitened, times the singular values.
        right_KERD: Right factors, whitened.
        left_root_OO: ``G^(-1/2)``.
        right_root_DD: ``X^(-1/2)``.
        size_KE: Squared norms of the steps.
    """

    left_KERO: Tensor
    right_KERD: Tensor
    left_root_OO: Tensor
    right_root_DD: Tensor
    size_KE: Tensor


class FitSums:
    """Sums over the rows that fit the steps.

    Args:
        units: ``K``.
        experts: ``E``.
        in_features: ``D``.
        out_features: ``O``.
        device: Where the rows are.

    Attributes:
        tensors: What ranks add up.
    """

    def __init__(
        self, units: int, experts: int, in_features: int, out_features: int, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        KE, D, width = (units, experts), in_features, out_features
        self.weight_KE, self.x_KED, self.delta_KEO = zeros(*KE), zeros(*KE, D), zeros(*KE, width)
        self.product_KEOD = zeros(*KE, width, D)
        self.second_DD, self.gram_OO, self.rows = zeros(D, D), zeros(width, width), zeros(1)
        self.tensors = (
            *(self.weight_KE, self.x_KED, self.delta_KEO, self.product_KEOD),
            *(self.second_DD, self.gram_OO, self.rows),
        )

    def add(self, rows: BucketRows) -> None:
        """Add the rows of a pass."""
        for total, part in zip(self.tensors, sums_of(rows), strict=True):
            total += part

    def directions(self, rank: int) -> Directions:
        """Find the steps; the same on every rank that has the same sums."""
        share_KE = self.weight_KE / self.weight_KE.sum(dim=1, keepdim=True)
        weight_KE1 = self.weight_KE.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(2)
        mean_x_KED, mean_delta_KEO = self.x_KED / weight_KE1, self.delta_KEO / weight_KE1
        inside_KEOD = self.product_KEOD / weight_KE1.unsqueeze(3)
        inside_KEOD = inside_KEOD - mean_delta_KEO.unsqueeze(3) * mean_x_KED.unsqueeze(2)
        inside_KEOD[self.weight_KE == 0] = 0.0
        overall_KOD = torch.einsum("ke,keod->kod", share_KE, inside_KEOD)
        between_KEOD = inside_KEOD - overall_KOD.unsqueeze(1)
        between_KEOD[self.weight_KE == 0] = 0.0
        total = self.weight_KE[0].sum()
        mean_D = self.x_KED[0].sum(dim=0) / total
        cov_DD = self.second_DD / total - mean_D[:, None] * mean_D
        left_OO, right_DD = inverse_root(self.gram_OO / total), inverse_root(cov_DD)
        u, sizes, v = torch.linalg.svd(left_OO @ between_KEOD @ right_DD, full_matrices=False)
        R = min(rank, sizes.shape[-1])
        sizes_KER = sizes[..., :R]
        return Directions(
            left_KERO=(u[..., :R] * sizes_KER.unsqueeze(-2)).transpose(-1, -2).contiguous(),
            right_KERD=v[..., :R, :].contiguous(),
            left_root_OO=left_OO,
            right_root_DD=right_DD,
            size_KE=sizes_KER.square().sum(dim=-1),
        )


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the steps bring on held-out rows, by unit.

    Attributes:
        slope_K: ``a``, by how much the loss falls along the step at first.
        size_K: ``b``, by how much it bends.
        overlap_KK: How much the steps of two units have in common; ``b`` on its diagonal.
    """

    slope_K: Tensor
    size_K: Tensor
    overlap_KK: Tensor


class HeldOutSums:
    """Sums over the rows that judge the steps, by block of rows.

    Args:
        directions: The steps.
        blocks: ``S``.

    Attributes:
        directions: As given.
        tensors: What ranks add up.
    """

    def __init__(self, directions: Directions, blocks: int) -> None:
        self.directions = directions
        self._left_KERO = directions.left_KERO @ directions.left_root_OO
        self._right_KERD = directions.right_KERD @ directions.right_root_DD
        K, E, R, _ = directions.left_KERO.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=directions.size_KE.device)

        self.weight_SKE, self.value_SKEE = zeros(blocks, K, E), zeros(blocks, K, E, E)
        self.delta_SKEER, self.x_SKEER = zeros(blocks, K, E, E, R), zeros(blocks, K, E, E, R)
        self.joint_JJ, self.rows = zeros(K * E, K * E), zeros(1)  # J = K E
        self.tensors = (
            *(self.weight_SKE, self.value_SKEE, self.delta_SKEER, self.x_SKEER),
            *(self.joint_JJ, self.rows),
        )

    def add(self, rows: BucketRows, block: int) -> None:
        """Add the rows of a pass to a block."""
        dtype, (K, E, R, width) = rows.x_ND.dtype, self.directions.left_KERO.shape
        left_KERO, right_KERD = self._left_KERO.to(dtype), self._right_KERD.to(dtype)
        if width * right_KERD.shape[3] <= SMALL:
            weight_KE, x_KED, delta_KEO, product_KEOD = bucket_sums(rows)
            self.weight_SKE[block] += weight_KE
            self.joint_JJ += joint_weights(rows)
            self.rows += len(rows.x_ND)
            step_KEOD = left_KERO.transpose(2, 3) @ right_KERD
            self.value_SKEE[block] += product_KEOD.flatten(2) @ step_KEOD.flatten(2).mT
            self.delta_SKEER[block] += torch.einsum("kjo,kero->kjer", delta_KEO, left_KERO)
            self.x_SKEER[block] += torch.einsum("kjd,kerd->kjer", x_KED, right_KERD)
            return
        left_OJ, right_DJ = left_KERO.flatten(0, 2).t(), right_KERD.flatten(0, 2).t()
        size = max(1, CHUNK // (K * E * R))
        for start in range(0, len(rows.x_ND), size):
            at = slice(start, start + size)
            weight_n = rows.weight_N[at]
            delta_KnJ = (rows.delta_NO[at] @ left_OJ).unflatten(1, (K, E * R)).transpose(0, 1)
            x_KnJ = (rows.x_ND[at] @ right_DJ).unflatten(1, (K, E * R)).transpose(0, 1)
            value_KnE = (delta_KnJ * x_KnJ).unflatten(2, (E, R)).sum(dim=3)
            hot_KEn = one_hot(rows.buckets.at(at), dtype)
            heavy_KEn = hot_KEn * weight_n
            self.weight_SKE[block] += heavy_KEn.sum(dim=2)
            self.joint_JJ += heavy_KEn.flatten(0, 1) @ hot_KEn.flatten(0, 1).t()
            self.rows += len(weight_n)
            self.value_SKEE[block] += hot_KEn @ value_KnE
            self.delta_SKEER[block] += (hot_KEn @ delta_KnJ).unflatten(2, (E, R))
            self.x_SKEER[block] += (heavy_KEn @ x_KnJ).unflatten(2, (E, R))

    @property
    def weight_S(self) -> Tensor:
        """Weight of each block's rows."""
        return self.weight_SKE[:, 0].sum(dim=1)

    def slopes(self, times_BS: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K)``, slope and size, where block ``s`` counts ``times_BS[b, s]`` times."""

        def total(sums: Tensor) -> Tensor:
            return torch.tensordot(times_BS, sums, dims=1)

        weight_BKE = total(self.weight_SKE)
        share_BKE = weight_BKE / weight_BKE.sum(dim=2, keepdim=True)
        each_BKE1 = weight_BKE.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(3)
        mean_delta = total(self.delta_SKEER) / each_BKE1.unsqueeze(4)
        mean_x = total(self.x_SKEER) / each_BKE1.unsqueeze(4)
        # [j, e]: what bucket j's rows say of the step of bucket e
        inside_BKEE = total(self.value_SKEE) / each_BKE1 - (mean_delta * mean_x).sum(dim=4)
        own_BKE = inside_BKEE.diagonal(dim1=2, dim2=3)
        mean_BKE = torch.einsum("bkj,bkje->bke", share_BKE, inside_BKEE)
        slope_BK = (share_BKE * (own_BKE - mean_BKE)).sum(dim=2)
        return slope_BK, (share_BKE * self.directions.size_KE).sum(dim=2)

    def statistics(self) -> Statistics:
        """What all rows say."""
        slope_BK, size_BK = self.slopes(self.weight_SKE.new_ones(1, len(self.weight_SKE)))
        left, right = self.directions.left_KERO, self.directions.right_KERD
        K, E, R, _ = left.shape
        overlap_KK = self.joint_JJ.new_zeros(K, K)
        share_KEKE = (self.joint_JJ / self.weight_SKE[:, 0].sum()).view(K, E, K, E)
        for unit in range(K):  # one at a time: all at once are (K E R)^2 numbers
            common = torch.einsum("ero,kfso->erkfs", left[unit], left)
            common *= torch.einsum("erd,kfsd->erkfs", right[unit], right)
            overlap_KK[unit] = (share_KEKE[unit] * common.sum(dim=(1, 4))).sum(dim=(0, 2))
        return Statistics(slope_K=slope_BK[0], size_K=size_BK[0], overlap_KK=overlap_KK)


def add_over_ranks(tensors: Sequence[Tensor], group: RankGroup | None) -> None:
    """Add up tensors of float64 over the ranks, in place; a collective call."""
    if size_of(group) == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=process_group_of(group))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def inverse_root(matrix: Tensor) -> Tensor:
    """``matrix^(-1/2)`` of a positive matrix, on the eigenvectors that are worth it."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > KEPT * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    roots = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return (vectors * roots) @ vectors.t()


def signed_gain(slope: Tensor, size: Tensor) -> Tensor:
    """``a |a| / 2 b``, in nats a row; 0 where ``b`` is."""
    return torch.where(size > 0, slope * slope.abs() / (2 * size.clamp(min=1e-300)), 0.0)
