"""How far two ways to compute the same may lie apart: what a check before a measurement allows."""

import torch
from torch import Tensor

__all__ = ["of_sums", "off_by"]


def of_sums(terms: int) -> float:
    """Return the units of roundoff by which a sum errs, for each unit of its terms.

    Roundings are as often up as down, so they grow as the square root of their number, but for a
    chance that four times as much leaves out (Higham and Mary 2019, "A new approach to
    probabilistic rounding error analysis").
    """
    return 4 * max(terms, 1) ** 0.5


def off_by(got: Tensor, want: Tensor, terms: int) -> float:
    """Return the largest error, in what sums of so many terms may err by: above 1 is too much.

    Args:
        got: Of any dtype, whose unit of roundoff it is.
        want: The same, as exact or more; its largest number stands for the terms.
        terms: The number of terms of the longest sum.
    """
    if not want.numel() or torch.equal(got.double(), want.double()):
        return 0.0
    if not got.is_floating_point():
        return float("inf")
    error = (got.double() - want.double()).abs().max().item()
    largest = want.double().abs().max().item()
    return error / (of_sums(terms) * torch.finfo(got.dtype).eps * largest)
