"""Products with the few vectors that each row chose, out of a bank of many.

The experts of a site need three, of which the first two are each other's adjoint:

    dot     d[n, s] = <x[n], bank[chosen[n, s]]>
    add     y[n]   += sum_s w[n, s] bank[chosen[n, s]]
    grad    g[h]    = sum of w[n, s] x[n] where chosen[n, s] == h

Dense products with the whole bank are one way: cheap to start, and they can be merged with others.
`Gathered` is the other: it touches the chosen vectors alone. A sum of weighted vectors is what an
embedding bag computes, so it borrows those kernels, which never build the ``(N, S, D)`` tensor of
the chosen vectors; for the gradient, the rows are sorted by their choice, and each vector's
gradient is the bag of its rows.

Shape legend:
    N  rows     D  width     S  choices of a row     H  vectors in the bank     F  N S
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Gathered", "gathering_pays", "spread"]


def gathering_pays(num_experts: int, top_k: int, width: int) -> bool:
    """Whether rows use so few of so wide a bank that dense products cost more.

    A dense product costs time in proportion to ``E D``, a gathered one to ``k (D + a constant)``;
    measured in ``benchmarks/LOG.md``.
    """
    return num_experts * width >= 512 * top_k


class Gathered:
    """The products of `N` rows with the vectors that they chose.

    Args:
        chosen_NS: Which vectors of its bank each row uses.
    """

    def __init__(self, chosen_NS: Tensor) -> None:
        self._chosen_NS = chosen_NS

    def dot(self, x_ND: Tensor, bank_HD: Tensor) -> Tensor:
        """The product of each row with each of its vectors; ``(N, S)``."""
        N, S = self._chosen_NS.shape
        row_F = torch.arange(N, device=x_ND.device, dtype=self._chosen_NS.dtype)
        row_F = row_F.repeat_interleave(S)
        dot_F = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_ND.contiguous(), bank_HD, self._chosen_NS.flatten(), row_F[:0], row_F, 0
        )
        return dot_F.view(N, S)

    def add(self, y_ND: Tensor, w_NS: Tensor, bank_HD: Tensor) -> Tensor:
        """Add to each row its weighted vectors, in place."""
        bags = F.embedding_bag(self._chosen_NS, bank_HD, mode="sum", per_sample_weights=w_NS)
        return y_ND.add_(bags)

    def sort(self, num_vectors: int) -> "Sorted":
        """Prepare for `Sorted.grad`."""
        flat_F, order_F = self._chosen_NS.flatten().sort(stable=True)
        vector_H = torch.arange(num_vectors, device=flat_F.device, dtype=flat_F.dtype)
        starts_H = torch.searchsorted(flat_F, vector_H)
        rows_F = order_F.div(self._chosen_NS.shape[1], rounding_mode="floor")
        return Sorted(order_F=order_F, rows_F=rows_F, starts_H=starts_H)


class Sorted:
    """Rows sorted by the vector that they chose.

    Args:
        order_F: The choices in the order of their vectors.
        rows_F: The rows that made them.
        starts_H: Where each vector's choices start.
    """

    def __init__(self, order_F: Tensor, rows_F: Tensor, starts_H: Tensor) -> None:
        self._order_F, self._rows_F, self._starts_H = order_F, rows_F, starts_H

    def grad(self, x_ND: Tensor, w_NS: Tensor) -> Tensor:
        """For each vector, the weighted sum of the rows that chose it; ``(H, D)``."""
        weights_F = w_NS.flatten()[self._order_F]
        return F.embedding_bag(
            self._rows_F, x_ND, self._starts_H, mode="sum", per_sample_weights=weights_F
        )


def spread(w_SN: Tensor, chosen_SN: Tensor, num_vectors: int) -> Tensor:
    """The weights at their vectors' places, zero elsewhere; ``(H, N)``."""
    return w_SN.new_zeros(num_vectors, w_SN.shape[1]).scatter_(0, chosen_SN, w_SN)
