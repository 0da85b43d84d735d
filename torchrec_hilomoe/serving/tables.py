"""Embedding tables of an exported model: whole, on one host, in 32, 16 or 8 bits a number.

Lookups are plain indexing, which a compiler fuses with what follows.

Shape legend:
    N  rows of a table     D  width     I  ids
"""

from typing import Literal

import fbgemm_gpu  # noqa: F401  # registers the operators in torch.ops.fbgemm
import torch
from torch import nn, Tensor
from torch.nn import functional as F

__all__ = ["Precision", "QuantizedTable", "Table", "table_of"]

Precision = Literal["fp32", "fp16", "int8"]


class Table(nn.Module):
    """A table of floating-point numbers, looked up as float32.

    Args:
        weight_ND: Its vectors.
    """

    weight: Tensor

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_ND)

    def forward(self, ids_I: Tensor) -> Tensor:
        """Return ``(I, D)``."""
        return F.embedding(ids_I, self.weight).float()


class QuantizedTable(nn.Module):
    """A table of bytes, each row with a scale and an offset of its own.

    The bytes are those of FBGEMM's row-wise quantisation: a row's smallest number is byte 0, its
    largest byte 255, so that a number is off by half a 255th of the row's range at most.

    Args:
        weight_ND: Its vectors, float32.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        packed = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight_ND.contiguous())
        width = weight_ND.shape[1]
        self.register_buffer("codes", packed[:, :width].contiguous())
        # FBGEMM keeps both as the bytes of float32 behind those of the row.
        self.register_buffer("scales", packed[:, width:].contiguous().view(torch.float32))

    def forward(self, ids_I: Tensor) -> Tensor:
        """Return ``(I, D)``."""
        scale_I1, offset_I1 = self.scales[ids_I].split(1, dim=1)
        return self.codes[ids_I].float() * scale_I1 + offset_I1


def table_of(weight_ND: Tensor, precision: Precision) -> nn.Module:
    """Return a table that holds these vectors.

    Example:
        >>> table_of(torch.tensor([[0.0, 1.0, 0.5, 0.25]]), "int8")(torch.tensor([0])).shape
        torch.Size([1, 4])
    """
    weight_ND = weight_ND.detach()
    if precision == "int8":
        return QuantizedTable(weight_ND)
    return Table(weight_ND.half() if precision == "fp16" else weight_ND.clone())
