"""Products with the few vectors that each row chose, out of a bank of many.

The experts of a site need three, of which the first two are each other's adjoint:

    dot     d[s, n] = <x[n], bank[chosen[s, n]]>
    add     y[n]   += sum_s w[s, n] bank[chosen[s, n]]
    grad    g[h]    = sum of w[s, n] x[n] where chosen[s, n] == h

There are three ways, equal up to rounding. `Dense` multiplies with the whole bank; it starts
cheaply. `Gathered` touches the chosen vectors alone: a sum of weighted vectors is what an embedding
bag computes, so it borrows those kernels, which never build the ``(N, S, D)`` tensor of chosen
vectors. `Indexed` does build it, but only on paper: a compiler fuses it away.

Shape legend:
    N  rows     D  width     S  choices of a row     H  vectors in the bank     F  N S
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["WAYS", "Dense", "Experts", "Gathered", "Indexed", "gathering_pays"]


def gathering_pays(num_experts: int, top_k: int, width: int) -> bool:
    """Whether rows use so few of so wide a bank that dense products cost more.

    A dense product takes time in proportion to ``E D``, a gathered one to ``k (D + a constant)``;
    measured in ``benchmarks/LOG.md``.
    """
    return num_experts >= 8 * top_k and num_experts * width >= 1024 * top_k


_RADIX_SORT_FROM = 32768  # PyTorch sorts shorter lists by comparison, which takes longer


class Experts(ABC):
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
        """Bring values of choices into the layout of this way, or back."""

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


class Dense(Experts):
    """Multiply with the whole bank, and pick; or spread the weights over the whole bank first."""

    @staticmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Rows last."""
        return values_SN

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """See `Experts`."""
        return (bank_HD @ x_ND.t()).gather(0, self._chosen)

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `Experts`."""
        return y_ND.addmm_(self._spread(w, len(bank_HD)).t(), bank_HD)

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `Experts`."""
        return self._spread(w, num_vectors) @ x_ND

    def _spread(self, w: Tensor, num_vectors: int) -> Tensor:
        return w.new_zeros(num_vectors, w.shape[1]).scatter_(0, self._chosen, w)


class Gathered(Experts):
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
        """See `Experts`."""
        N, S = self._chosen.shape
        row_F = _up_to(N, self._chosen).repeat_interleave(S)
        dot_F = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_ND.contiguous(), bank_HD, self._chosen.flatten(), row_F[:0], row_F, 0
        )
        return dot_F.view(N, S)

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `Experts`."""
        return y_ND.add_(F.embedding_bag(self._chosen, bank_HD, mode="sum", per_sample_weights=w))

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `Experts`; rows are sorted by their choice, and each vector has its bag of rows."""
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


class Indexed(Experts):
    """Plain indexing, for a compiler to fuse."""

    @staticmethod
    def layout(values_SN: Tensor) -> Tensor:
        """Rows last."""
        return values_SN

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """See `Experts`."""
        return torch.stack([(x_ND * bank_HD[chosen_N]).sum(dim=1) for chosen_N in self._chosen])

    def add(self, y_ND: Tensor, w: Tensor, bank_HD: Tensor) -> Tensor:
        """See `Experts`."""
        for chosen_N, w_N in zip(self._chosen, w, strict=True):
            y_ND += w_N.unsqueeze(1) * bank_HD[chosen_N]
        return y_ND

    def grad(self, x_ND: Tensor, w: Tensor, num_vectors: int) -> Tensor:
        """See `Experts`; a dense product, because scattered additions do not vectorise."""
        return w.new_zeros(num_vectors, w.shape[1]).scatter_(0, self._chosen, w) @ x_ND


def _up_to(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


WAYS: dict[str, type[Experts]] = {"dense": Dense, "gathered": Gathered, "indexed": Indexed}
