"""The same question as `interactions`, asked of few rows: every pair of blocks of rows is compared.

Where half of the rows fit a step and the others judge it, a step that is fitted to noise hides
what there is. Here nothing is fitted. What two blocks say of a bucket, ``Δ_e``, has independent
noise, so the mean of its products over pairs of blocks is the squared norm of ``Δ_e`` without that
noise. Half of it, weighted by the buckets' shares, is the gain of the whole step: of any rank,
where `interactions` tells of rank ``R``. Every row is compared with those of all other blocks.
`reference.paired_gain` is the same as loops.

Shape legend: as in `interactions`, and
    S  blocks of held-out rows     T  all blocks: those, and one of rows that are not held out
    J  buckets of all units, K E     W  numbers of a step, O D     B  resamples
"""

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.probe.interactions import FitSums, inverse_root, Statistics
from torchrec_hilomoe.hilomoe.probe.rows import BucketRows, joint_weights, sums_of

__all__ = ["PairSums"]

TINY = torch.finfo(torch.float64).tiny
ALIKE = 0.99  # the most that two units may have in common: more is noise, or the same unit


class PairSums:
    """Sums over blocks of rows.

    Args:
        units: ``K``.
        experts: ``E``.
        in_features: ``D``.
        out_features: ``O``.
        blocks: ``S``.
        device: Where the rows are.

    Attributes:
        tensors: What ranks add up.
    """

    def __init__(
        self,
        units: int,
        experts: int,
        in_features: int,
        out_features: int,
        blocks: int,
        device: torch.device,
    ) -> None:
        self._blocks, self._units, self._experts = blocks, units, experts
        one = FitSums(units, experts, in_features, out_features, device)
        self._sums = tuple(tensor.new_zeros(blocks + 1, *tensor.shape) for tensor in one.tensors)
        J = units * experts
        self._joint_JJ = torch.zeros(J, J, dtype=torch.float64, device=device)
        self.tensors = (*self._sums, self._joint_JJ)

    @property
    def rows(self) -> Tensor:
        """Number of held-out rows."""
        return self._sums[-1][: self._blocks].sum()

    @property
    def trained_rows(self) -> Tensor:
        """Number of rows that are not held out."""
        return self._sums[-1][self._blocks]

    @property
    def weight_S(self) -> Tensor:
        """Weight of each block's held-out rows."""
        return self._sums[0][: self._blocks, 0].sum(dim=1)

    @property
    def weight_KE(self) -> Tensor:
        """Weight of each bucket's rows."""
        return self._sums[0].sum(dim=0)

    def add(self, rows: BucketRows, block: int | None) -> None:
        """Add the rows of a pass to a block; None is that of rows that are not held out."""
        at = self._blocks if block is None else block
        for sums_T, part in zip(self._sums, sums_of(rows), strict=True):
            sums_T[at] += part
        # Shares of pairs of buckets want few rows, and cost as much as the rest. Rows that judge
        # may miss the first block where other rows were heard before.
        if block is None or block == 0:
            self._joint_JJ += joint_weights(rows)

    def _differences(self) -> Tensor:
        """``(T, K, E, O D)``, what each block says of each bucket, whitened."""
        weight_TKE, x_TKED, delta_TKEO, product_TKEOD, second_TDD, gram_TOO, _ = self._sums
        weight_TKE1 = weight_TKE.clamp(min=TINY).unsqueeze(3)
        mean_x, mean_delta = x_TKED / weight_TKE1, delta_TKEO / weight_TKE1
        inside = product_TKEOD / weight_TKE1.unsqueeze(4)
        inside = inside - mean_delta.unsqueeze(4) * mean_x.unsqueeze(3)
        inside[weight_TKE == 0] = 0.0
        share_TKE = weight_TKE / weight_TKE.sum(dim=2, keepdim=True).clamp(min=TINY)
        between = inside - torch.einsum("tke,tkeod->tkod", share_TKE, inside).unsqueeze(2)
        between[weight_TKE == 0] = 0.0
        total = weight_TKE[:, 0].sum()
        mean_D = x_TKED[:, 0].sum(dim=(0, 1)) / total
        cov_DD = second_TDD.sum(dim=0) / total - mean_D[:, None] * mean_D
        left_OO, right_DD = inverse_root(gram_TOO.sum(dim=0) / total), inverse_root(cov_DD)
        return (left_OO @ between @ right_DD).flatten(3)

    def slopes(self, times_BS: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K)``, slope and size, where block ``s`` counts ``times_BS[b, s]`` times."""
        share_TKE = self._shares()
        part_TKEW = self._differences() * share_TKE.unsqueeze(3)
        product_KETT = torch.einsum("tkew,ukew->ketu", part_TKEW, part_TKEW)
        pairs_KETT = torch.einsum("tke,uke->ketu", share_TKE, share_TKE)
        times_BT = torch.cat([times_BS, times_BS.new_ones(len(times_BS), 1)], dim=1)
        counts_BTT = times_BT.unsqueeze(2) * times_BT.unsqueeze(1)
        counts_BTT = counts_BTT * (1 - torch.eye(self._blocks + 1).to(counts_BTT))
        squared_BKE = torch.einsum("btu,ketu->bke", counts_BTT, product_KETT)
        counted_BKE = torch.einsum("btu,ketu->bke", counts_BTT, pairs_KETT)
        squared_BKE /= counted_BKE.clamp(min=TINY)
        weight_KE = self.weight_KE
        slope_BK = (squared_BKE * weight_KE / weight_KE.sum(dim=1, keepdim=True)).sum(dim=2)
        return slope_BK, slope_BK.abs()

    def _shares(self) -> Tensor:
        """``(T, K, E)``, the share of each block in a bucket's rows."""
        return self._sums[0] / self.weight_KE.clamp(min=TINY)

    def statistics(self) -> Statistics:
        """What all rows say, and how much of it two units have in common."""
        share_TJ = self._shares().flatten(1)
        part_TJW = self._differences().flatten(1, 2) * share_TJ.unsqueeze(2)
        mean_JW = part_TJW.sum(dim=0)
        common_JJ = mean_JW @ mean_JW.t() - (part_TJW @ part_TJW.mT).sum(dim=0)
        common_JJ /= (1 - share_TJ.t() @ share_TJ).clamp(min=TINY)
        K, E = self._units, self._experts
        together_JJ = common_JJ * self._joint_JJ / self._joint_JJ.sum().clamp(min=TINY) * K * K
        overlap_KK = together_JJ.view(K, E, K, E).sum(dim=(1, 3))
        slope_BK, size_BK = self.slopes(self.weight_S.new_ones(1, self._blocks))
        # Products of what is noisy may exceed what two units can have in common.
        most_KK = ALIKE * (size_BK[0, :, None] * size_BK[0]).sqrt()
        overlap_KK = overlap_KK.clamp(min=-most_KK, max=most_KK)
        overlap_KK.diagonal().copy_(size_BK[0])
        return Statistics(slope_K=slope_BK[0], size_K=size_BK[0], overlap_KK=overlap_KK)
