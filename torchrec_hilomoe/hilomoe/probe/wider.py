"""The control ``wider``: what hidden units beside a site would gain for the FLOPs of its experts.

Experts are not the only way to spend FLOPs: units ``relu(a x + c)`` that add to the site's output
are a wider layer. `Wider` draws many, takes from some rows the step of low rank, as many units as
the experts cost, that pays most, and judges it by others: the statistic of `interactions`, with
units in place of buckets. Units that train find better directions than any that are drawn, so the
control is a lower end of what width brings.

Shape legend:
    N  rows     D  input width     O  output width     M  random units     U  units that are paid
    S  blocks
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.probe.interactions import inverse_root

__all__ = ["Wider"]

UNITS = 256  # M


class Wider:
    """Sums over rows that fit, then over rows that judge.

    Args:
        paid: ``U``.
        in_features: ``D``.
        out_features: ``O``.
        blocks: ``S``.
        seed: Of the units.
        device: Where the rows are.
        units: ``M``.

    Attributes:
        step: What `settle` has chosen: left and right factors, whitened, and the squared norm.
        fit_tensors: What ranks add up before `settle`.
        tensors: What ranks add up after it.
    """

    def __init__(
        self,
        paid: int,
        in_features: int,
        out_features: int,
        blocks: int,
        seed: int,
        device: torch.device,
        units: int = UNITS,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        generator = torch.Generator().manual_seed(seed)
        M, width, U = units, out_features, min(paid, units, out_features)
        self._weight_DM = torch.randn(in_features, M, generator=generator).to(device)
        self._weight_DM /= math.sqrt(in_features)
        self._bias_M = torch.randn(M, generator=generator).to(device)
        self._paid = U
        self.step: tuple[Tensor, Tensor, Tensor] | None = None
        self.weight, self.unit_M, self.delta_O = zeros(1), zeros(M), zeros(width)
        self.second_MM, self.gram_OO, self.product_OM = (
            zeros(M, M),
            zeros(width, width),
            zeros(width, M),
        )
        self.fit_tensors = (
            *(self.weight, self.unit_M, self.delta_O),
            *(self.second_MM, self.gram_OO, self.product_OM),
        )
        self.weight_S = zeros(blocks)
        self.value_S, self.delta_SU, self.unit_SU = (
            zeros(blocks),
            zeros(blocks, U),
            zeros(blocks, U),
        )
        self.tensors = (self.weight_S, self.value_S, self.delta_SU, self.unit_SU)

    def _units(self, x_ND: Tensor) -> Tensor:
        # A row's own scale, since inputs of a plain model have any.
        x_ND = F.rms_norm(x_ND, x_ND.shape[1:])
        return F.relu(x_ND @ self._weight_DM.to(x_ND.dtype) + self._bias_M.to(x_ND.dtype))

    def fit(self, x_ND: Tensor, delta_NO: Tensor, weight_N: Tensor) -> None:
        """Add rows that fit; gradients are times their weights."""
        units_NM = self._units(x_ND)
        weighted_NM = units_NM * weight_N[:, None]
        self.weight += weight_N.sum()
        self.unit_M += weighted_NM.sum(dim=0)
        self.delta_O += delta_NO.sum(dim=0)
        self.second_MM += weighted_NM.t() @ units_NM
        self.gram_OO += delta_NO.t() @ (delta_NO / weight_N[:, None])
        self.product_OM += delta_NO.t() @ units_NM

    def settle(self) -> None:
        """Choose the step."""
        mean_M = self.unit_M / self.weight
        cov_MM = self.second_MM / self.weight - mean_M[:, None] * mean_M
        left_OO, right_MM = inverse_root(self.gram_OO / self.weight), inverse_root(cov_MM)
        delta_O = self.delta_O / self.weight
        inside_OM = self.product_OM / self.weight - delta_O[:, None] * mean_M
        u, sizes, v = torch.linalg.svd(left_OO @ inside_OM @ right_MM, full_matrices=False)
        U = self._paid
        left_OU, right_MU = left_OO @ (u[:, :U] * sizes[:U]), right_MM @ v[:U].t()
        self.step = (left_OU, right_MU, sizes[:U].square().sum())

    def judge(self, x_ND: Tensor, delta_NO: Tensor, weight_N: Tensor, block: int) -> None:
        """Add rows that judge to a block."""
        assert self.step is not None
        left_OU, right_MU, _ = self.step
        delta_NU = delta_NO @ left_OU.to(delta_NO.dtype)
        unit_NU = self._units(x_ND) @ right_MU.to(x_ND.dtype)
        self.weight_S[block] += weight_N.sum()
        self.value_S[block] += (delta_NU * unit_NU).sum()
        self.delta_SU[block] += delta_NU.sum(dim=0)
        self.unit_SU[block] += (unit_NU * weight_N[:, None]).sum(dim=0)

    def slopes(self, times_BS: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 1)``, slope and size, where block ``s`` counts ``times_BS[b, s]`` times."""
        assert self.step is not None
        weight_B1 = (times_BS @ self.weight_S)[:, None]
        means_B = ((times_BS @ self.delta_SU) * (times_BS @ self.unit_SU)).sum(dim=1)
        slope_B1 = (times_BS @ self.value_S)[:, None] / weight_B1 - means_B[:, None] / weight_B1**2
        return slope_B1, self.step[2].expand_as(slope_B1)
