"""Products with the few vectors that each row chose, out of a bank of many.

The experts of a site need three, of which the first two are each other's adjoint:

    dot     d[s, n] = <x[n], bank[chosen[s, n]]>
    add     y[n]   += sum_s w[s, n] bank[chosen[s, n]]
    grad    g[h]    = sum of w[s, n] x[n] where chosen[s, n] == h

There are three kernels, equal up to rounding. `DenseKernel` multiplies with the whole bank; it
starts cheaply. `GatheredKernel` touches the chosen vectors alone: a sum of weighted vectors is what
an embedding bag computes, so it borrows PyTorch's kernels for those, which never build the
``(N, S, D)`` tensor of chosen vectors. `IndexedKernel` does build it, but only on paper: a compiler
fuses it away. `mix` adds the experts' products to the base map.

The functions here know nothing of autograd: `function` calls each forward with its backward.

Shape legend:
    N  rows     D  width     O  output width     L  expert layers     E  experts     R  rank
    k  experts chosen     S  vectors that a row uses, L k R     H  vectors in the bank     F  N S
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.execution import Execution
from torchrec_hilomoe.hilomoe.losses import wide

__all__ = [
    "EXPERT_KERNELS",
    "DenseKernel",
    "ExpertKernel",
    "GatheredKernel",
    "IndexedKernel",
    "MixGradients",
    "Mixed",
    "mix",
    "mix_backward",
]

_RADIX_SORT_FROM = 32768  # PyTorch sorts shorter lists by comparison, which takes longer


class ExpertKernel(ABC):
    """The products of ``N`` rows with the vectors that they chose.

    Values of choices, ``w`` and ``d`` above, are kept in the layout that suits the products.

    Args:
        chosen: Which vectors of their bank the rows use, in that layout.
    """

    def __init__(self, chosen: Tensor) -> None:
        self._chosen = chosen

    @staticmethod
    @abstractmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Bring values of choices into the kernel's layout, or back."""

    @classmethod
    def indices(cls, chosen_SN: Tensor) -> Tensor:
        """Bring the choices themselves into that layout."""
        return cls.layout(chosen_SN)

    @abstractmethod
    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """The product of each row with each of its vectors."""

    @abstractmethod
    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """Add to each row its weighted vectors, in place."""

    @abstractmethod
    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """For each vector, the weighted sum of the rows that chose it; ``(H, D)``."""


class DenseKernel(ExpertKernel):
    """Multiply with the whole bank, and pick; or spread the weights over the whole bank first."""

    @staticmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Rows last."""
        return values_SN

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        return (bank_HD @ x_ND.t()).gather(0, self._chosen)

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        return y_ND.addmm_(self._spread(w, len(bank_HD)).t(), bank_HD)

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `ExpertKernel`."""
        return self._spread(w, num_vectors) @ x_ND

    def _spread(self, w: Tensor, num_vectors: int) -> Tensor:
        return w.new_zeros(num_vectors, w.shape[1]).scatter_(0, self._chosen, w)


class GatheredKernel(ExpertKernel):
    """Touch the chosen vectors alone, with the kernels of embedding bags."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__(chosen)
        self._sorted: list[Tensor] = []

    @staticmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Choices last."""
        return values_SN.t().contiguous()

    @classmethod
    def indices(cls, chosen_SN: Tensor) -> Tensor:
        """In 32 bits, which sort in half the time."""
        return cls.layout(chosen_SN.int())

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        N, S = self._chosen.shape
        row_F = _up_to(N, self._chosen).repeat_interleave(S)
        dot_F = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_ND.contiguous(), bank_HD, self._chosen.flatten(), row_F[:0], row_F, 0
        )
        return dot_F.view(N, S)

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        return y_ND.add_(F.embedding_bag(self._chosen, bank_HD, mode="sum", per_sample_weights=w))

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `ExpertKernel`; rows are sorted by choice, so each vector has its bag of rows."""
        values_F, order_F, rows_F = self._in_order()
        starts_H = torch.searchsorted(values_F, _up_to(num_vectors, values_F))
        weights_F = w.flatten()[order_F]
        return F.embedding_bag(rows_F, x_ND, starts_H, mode="sum", per_sample_weights=weights_F)

    def _in_order(self) -> list[Tensor]:
        """The choices in the order of their vectors, their places, and the rows that made them."""
        if not self._sorted:
            flat_F = self._chosen.flatten()
            count = len(flat_F)
            if _RADIX_SORT_FROM // 4 < count < _RADIX_SORT_FROM:  # pad with what sorts to the end
                flat_F = F.pad(flat_F, (0, _RADIX_SORT_FROM - count), value=2**31 - 1)
            values_F, order_F = flat_F.sort(stable=True)
            rows_F = order_F[:count].div(self._chosen.shape[1], rounding_mode="floor")
            self._sorted = [values_F[:count], order_F[:count], rows_F]
        return self._sorted


class IndexedKernel(ExpertKernel):
    """Plain indexing, for a compiler to fuse."""

    @staticmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Rows last."""
        return values_SN

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        return torch.stack([(x_ND * bank_HD[chosen_N]).sum(dim=1) for chosen_N in self._chosen])

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        for chosen_N, w_N in zip(self._chosen, w, strict=True):
            y_ND += w_N.unsqueeze(1) * bank_HD[chosen_N]
        return y_ND

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `ExpertKernel`; a dense product, because scattered additions do not vectorise."""
        return w.new_zeros(num_vectors, w.shape[1]).scatter_(0, self._chosen, w) @ x_ND


def _up_to(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


EXPERT_KERNELS: dict[str, type[ExpertKernel]] = {
    "dense": DenseKernel,
    "gathered": GatheredKernel,
    "indexed": IndexedKernel,
}


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What `mix` found, but for the output in the layout of its kernel.

    Attributes:
        y_NO: The output.
        slots: Where the chosen experts' vectors lie among those of all layers.
        hidden: The products with these.
    """

    y_NO: Tensor
    slots: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class MixGradients:
    """By the arguments of `mix`; empty where none is needed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    gates_LkN: Tensor


def mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates_LkN: Tensor,
    chosen_LkN: Tensor,
    config: HiLoMoEConfig,
    execution: Execution,
) -> Mixed:
    """Add to the base map what the gated experts say."""
    kernel, y_NO = _kernel(execution, x), F.linear(x, weight, bias)
    slots = kernel.indices(_slots(chosen_LkN, config))
    experts = kernel(slots)
    hidden = experts.dot(x, down)
    gates = _gates(kernel, gates_LkN, hidden.dtype, config)
    experts.add(y_NO, hidden * gates, _scaled(up, config.alpha))
    return Mixed(y_NO=y_NO, slots=slots, hidden=hidden)


def mix_backward(
    grad_NO: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    gates_LkN: Tensor,
    slots: Tensor,
    hidden: Tensor,
    config: HiLoMoEConfig,
    execution: Execution,
    needs: Sequence[bool],
) -> MixGradients:
    """Each expert weighs its up-vector with gate * hidden.

    ``needs`` says whether input, weight and bias need a gradient.
    """
    need_x, need_weight, need_bias = needs
    grad_NO = grad_NO.contiguous()  # a host's sum() hands out one number, expanded
    kernel = _kernel(execution, x)
    experts, gates = kernel(slots), _gates(kernel, gates_LkN, hidden.dtype, config)
    grad_w = experts.dot(grad_NO, _scaled(up, config.alpha))
    grad_hidden = grad_w * gates
    grad_gates_SN = wide(experts.layout(grad_w * hidden))
    k, R, N = config.top_k, config.rank, len(x)
    L = len(grad_gates_SN) // (k * R)
    return MixGradients(
        x=experts.add(grad_NO @ weight, grad_hidden, down) if need_x else grad_NO.new_empty(0),
        weight=grad_NO.t() @ x if need_weight else grad_NO.new_empty(0),
        bias=grad_NO.sum(dim=0) if need_bias else grad_NO.new_empty(0),
        down=experts.grad(x, grad_hidden, len(down)),
        up=_scaled(experts.grad(grad_NO, hidden * gates, len(up)), config.alpha),
        gates_LkN=grad_gates_SN.reshape(L, k, R, N).sum(dim=2),
    )


def _kernel(execution: Execution, x: Tensor) -> type[ExpertKernel]:
    return EXPERT_KERNELS[execution.gpu_experts if x.is_cuda else execution.experts]


def _gates(
    kernel: type[ExpertKernel], gates_LkN: Tensor, dtype: torch.dtype, config: HiLoMoEConfig
) -> Tensor:
    """One for each vector, in the kernel's layout."""
    gates_SN = gates_LkN.to(dtype).flatten(0, 1)
    if config.rank > 1:
        gates_SN = gates_SN.repeat_interleave(config.rank, dim=0)
    return kernel.layout(gates_SN)


def _scaled(t: Tensor, alpha: float) -> Tensor:
    return t if alpha == 1 else t * alpha


def _slots(chosen_LkN: Tensor, config: HiLoMoEConfig) -> Tensor:
    """See `Mixed`; ``(S, N)``."""
    (L, k, N), E, R = chosen_LkN.shape, config.num_experts, config.rank
    first_L11 = torch.arange(0, L * E, E, device=chosen_LkN.device).view(L, 1, 1)
    expert_SN = (chosen_LkN + first_L11).view(L * k, N)
    if R == 1:
        return expert_SN
    rank_R1 = torch.arange(R, device=expert_SN.device).unsqueeze(1)
    return (expert_SN.unsqueeze(1) * R + rank_R1).view(L * k * R, N)
