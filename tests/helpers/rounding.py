"""How far a result may be from the exact one, derived from the dtype and from the sums in it.

Two rules. A sum of products errs by its terms, not by what is left after they cancel: the
reference on absolute values adds up the terms. A softmax or a choice between near-equals
amplifies errors in ways that no sum bounds: there, a result may be twice as wrong as the obvious
computation in the same dtype is.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["assert_as_exact_as", "value_and_grads"]


def value_and_grads(
    fn: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: Mapping[str, Tensor],
    cotangent: Tensor,
) -> dict[str, Tensor]:
    """Return the output ``y`` and the gradient of every input, by name.

    Args:
        fn: Takes the tensors by name, returns ``y`` and a loss that joins ``y``'s own, or None.
        tensors: Floating-point inputs.
        cotangent: The gradient of ``y``.
    """
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, loss = fn(**leaves)
    outputs, cotangents = [y], [cotangent]
    if loss is not None and loss.requires_grad:
        outputs, cotangents = [y, loss], [cotangent, torch.ones_like(loss)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = dict(zip(leaves, grads, strict=True))
    return {
        "y": y.detach(),
        **{name: torch.zeros_like(leaves[name]) if g is None else g for name, g in found.items()},
    }


def assert_as_exact_as(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    terms: int,
) -> None:
    """Check that ``actual`` errs by at most twice what ``plain`` does, and a rounding of its sums.

    Args:
        actual: Results of the code under test in ``dtype``.
        plain: Results of the obvious computation in ``dtype``; for float64, in float32: rounding
            errors are proportional to the unit, which the comparison takes into account.
        exact: The same in float64.
        dtype: Of the code under test.
        terms: The number of terms of the longest sum.
    """
    eps = torch.finfo(dtype).eps
    # Where a result cancels to almost nothing, its terms are as large as other results are.
    largest = max(want.abs().max() for want in exact.values() if want.numel())
    for name, want in exact.items():
        if want.numel() == 0:
            continue
        unit = eps / torch.finfo(plain[name].dtype).eps
        plain_error = (plain[name].double() - want).abs().max() * unit
        bound = 2 * plain_error + 4 * eps * terms**0.5 * want.abs().max() + eps * largest
        error = (actual[name].double() - want).abs().max()
        assert error <= bound, f"{name}: error {error:.2e} beyond {bound:.2e} in {dtype}"
