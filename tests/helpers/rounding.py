"""How far a result may be from the exact one, derived from the dtype and from the sums in it.

Every tolerance of the tests comes from here (``tests/contracts/test_tolerances.py``). What there
is, by what is compared:

- bits that must be equal: :func:`assert_same`;
- two ways to compute the same in float64, where rounding is not the subject:
  :func:`assert_within` of :func:`float64_rounding`;
- two ways to compute the same where float64 cannot be had, or gradients of a deep model:
  :func:`assert_within` of :func:`rounding_of`, which measures how far rounding carries;
- a result in any dtype against a float64 reference: the reference on absolute values, or
  :func:`assert_as_exact_as`, or ``tests/helpers/definitions.py``;
- Python's numbers: :func:`rounded`; what a sample says of its distribution: :func:`by_chance`.

Two rules are behind all. A sum of products errs by its terms, not by what is left after they
cancel: the reference on absolute values adds up the terms. A softmax or a choice between
near-equals amplifies errors in ways that no sum bounds: there, a result may be twice as wrong as
the obvious computation in the same dtype is, or as far off as a rounding of its inputs carries it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn, Tensor

from benchmarks.rounding import of_sums

__all__ = [
    "assert_as_exact_as",
    "assert_same",
    "assert_within",
    "bounds_of",
    "by_chance",
    "float64_rounding",
    "nudged",
    "of_sums",
    "rounded",
    "rounding_of",
    "value_and_grads",
    "within",
]

NUDGES = 4
Results = Tensor | Sequence[Any] | Mapping[str, Any]
Bound = float | Tensor | Mapping[str, float]


def assert_same(got: Results, want: Results, msg: str = "") -> None:
    """Check that all numbers are equal to the bit, as are dtypes and shapes; NaN is NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=msg or None)


def within(got: Tensor, want: Tensor, bound: Bound) -> Tensor:
    """Return where two results are no further apart than ``bound``, which may be a tensor."""
    assert not isinstance(bound, Mapping)
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    allowed = bound.detach().double() if isinstance(bound, Tensor) else bound
    return (got.detach().double() - want.detach().double()).abs() <= allowed


def assert_within(got: Results, want: Results, bound: Bound, msg: str = "") -> None:
    """Check that ``got`` is nowhere further from ``want`` than ``bound``.

    Args:
        got: A tensor, or a sequence or mapping of them.
        want: The same.
        bound: For every number; by name, where results are by name.
        msg: What the comparison is of.
    """
    for name, mine, other in _pairs(got, want):
        assert mine.dtype == other.dtype or other.dtype == torch.float64, (name, mine.dtype)
        allowed = bound[name] if isinstance(bound, Mapping) else bound
        if not within(mine, other, allowed).all():
            error = (mine.double() - other.double()).abs().max()
            most = float(torch.as_tensor(allowed).detach().max())
            raise AssertionError(f"{msg} {name}: off by up to {error:.3e}, allowed {most:.3e}")


def float64_rounding(*of: Any) -> float:
    """Bound what is computed in float64, by whichever way, from parameters and inputs.

    On its way into a result a number is rounded once for each term of the sums that it becomes
    part of; those are no more than there are numbers to add up. A chain of ``n`` roundings errs by
    ``n`` units of roundoff at most, of the largest number on the way (Higham, "Accuracy and
    Stability of Numerical Algorithms", 3.1), which is taken to be the largest of those given.

    Args:
        of: Modules, tensors and dataclasses of them: all that the results are computed from, and,
            where results may be larger than that, the results.
    """
    tensors = [tensor for thing in of for tensor in _tensors(thing)]
    assert all(tensor.dtype == torch.float64 for tensor in tensors), "compute in float64"
    largest = max(float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel())
    roundings = sum(tensor.numel() for tensor in tensors)
    return roundings * torch.finfo(torch.float64).eps * max(largest, 1.0)


def rounding_of(
    fn: Callable[..., Any],
    *inputs: Any,
    dtype: torch.dtype | None = None,
    terms: int | None = None,
) -> Any:
    """Measure how far apart two ways to compute the same may lie, adding up in another order.

    A sum that was rounded is the exact sum of terms that were each moved by a little. So every
    parameter and input is moved by about a unit of roundoff, at random, and the largest move of a
    result is multiplied by what sums do to units (:func:`of_sums`). What amplifies rounding on the
    way, such as a norm, does so here as well.

    Args:
        fn: A module or a function; random numbers in it are the same in each run.
        inputs: Its arguments: tensors, modules, and dataclasses, sequences and mappings of them.
            Modules are copied first, so that none of them changes.
        dtype: Whose unit of roundoff it is. Default: each tensor's own.
        terms: The number of terms of the longest sum that is rounded in ``dtype``; 1 for 16 bits,
            whose sums are made in 32. Default: the size of the longest axis.

    Returns:
        A bound for every number of the result; bounds by name, where ``fn`` returns several.
    """
    tensors = [tensor for thing in (fn, *inputs) for tensor in _tensors(thing)]
    longest = max(max(tensor.shape, default=1) for tensor in tensors)
    with torch.random.fork_rng(devices=[]):
        want, moved = _run(_copied(fn), [_copied(thing) for thing in inputs]), []
        for nudge in range(NUDGES):
            torch.manual_seed(1 + nudge)
            moved.append(_run(nudged(fn, dtype), [nudged(thing, dtype) for thing in inputs]))
    bounds = bounds_of(want, moved, terms or longest, dtype)
    return bounds[""] if bounds.keys() == {""} else bounds


def bounds_of(
    want: Mapping[str, Tensor],
    moved: Sequence[Mapping[str, Tensor]],
    terms: int,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Bound results by how far they were moved by moving what they were computed from.

    For computations that are too long for :func:`rounding_of`, such as some steps of training.

    Args:
        want: Results by name.
        moved: The same, of :func:`nudged` inputs.
        terms: The number of terms of the longest sum.
        dtype: What was computed in. Default: each result's own.
    """
    bounds = {}
    for name, tensor in want.items():
        if not tensor.numel():
            bounds[name] = 0.0
            continue
        # A result itself is rounded, too.
        eps = torch.finfo(dtype or tensor.dtype).eps if tensor.is_floating_point() else 0.0
        moves = [(other[name].double() - tensor.double()).abs().max() for other in moved]
        bounds[name] = of_sums(terms) * max(eps * float(tensor.abs().max()), *map(float, moves))
    return bounds


def nudged(thing: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy, of which every number is moved at random by about a unit of roundoff.

    Args:
        thing: A tensor, a module, or a dataclass, sequence or mapping of them.
        dtype: Whose unit of roundoff it is. Default: each tensor's own.
    """
    if isinstance(thing, nn.Module):
        thing = copy.deepcopy(thing)
        with torch.no_grad():
            for parameter in thing.parameters():
                parameter.copy_(nudged(parameter.detach(), dtype))
        return thing
    if isinstance(thing, Tensor):
        if not thing.is_floating_point():
            return thing
        units = torch.randn_like(thing) * torch.finfo(dtype or thing.dtype).eps
        return (thing.detach() * (1 + units)).requires_grad_(thing.requires_grad)
    parts = {key: nudged(part, dtype) for key, part in _parts(thing).items()}
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **parts)
    if isinstance(thing, Mapping):
        return parts
    return type(thing)(parts.values()) if isinstance(thing, (list, tuple)) else thing


def rounded(
    value: Any, terms: int = 1, dtype: torch.dtype = torch.float64, scale: float = 0.0
) -> Any:
    """What equals ``value`` but for the rounding of a sum of terms of one sign.

    Args:
        value: A number, or a list, tuple or dict of them; NaN equals NaN.
        terms: The number of terms of the longest sum, or of operations.
        dtype: What it was computed in.
        scale: Of what it is a difference, where that is larger than ``value``.
    """
    unit = of_sums(terms) * torch.finfo(dtype).eps
    return pytest.approx(value, rel=unit, abs=unit * scale, nan_ok=True)


def by_chance(value: float, deviation: float) -> Any:
    """What equals ``value`` but for chance: within five standard deviations, as 1 - 6e-7 are."""
    return pytest.approx(value, rel=0, abs=5 * deviation)


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


def _pairs(got: Results, want: Results, name: str = "") -> Iterator[tuple[str, Tensor, Tensor]]:
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), name
        yield name, got.detach(), want.detach()
        return
    if isinstance(want, Mapping):
        assert isinstance(got, Mapping), name
        assert got.keys() == want.keys(), name
        keyed = [(key, got[key], want[key]) for key in want]
    else:
        assert len(got) == len(want), name
        keyed = [(str(at), *pair) for at, pair in enumerate(zip(got, want, strict=True))]
    for key, mine, other in keyed:
        yield from _pairs(mine, other, f"{name}.{key}" if name else key)


def _tensors(thing: Any) -> Iterator[Tensor]:
    """The floating-point tensors of ``thing``."""
    if isinstance(thing, nn.Module):
        yield from (p for p in (*thing.parameters(), *thing.buffers()) if p.is_floating_point())
    elif isinstance(thing, Tensor):
        if thing.is_floating_point():
            yield thing
    else:
        for part in _parts(thing).values():
            yield from _tensors(part)


def _parts(thing: Any) -> dict[Any, Any]:
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    if isinstance(thing, Mapping):
        return dict(thing)
    return dict(enumerate(thing)) if isinstance(thing, (list, tuple)) else {}


def _run(fn: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = fn(*inputs)
    return {name: tensor.detach().clone() for name, tensor, _ in _pairs(found, found)}


def _copied(thing: Any) -> Any:
    return copy.deepcopy(thing) if isinstance(thing, nn.Module) else thing
