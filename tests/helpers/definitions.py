"""A backbone against its definition: values and every gradient, in any dtype, against float64."""

from collections.abc import Callable

import torch
from torch import nn, Tensor
from torch.func import functional_call

from tests.helpers.features import flat, unflat
from tests.helpers.rounding import of_sums, value_and_grads
from torchrec_hilomoe.embeddings.features import SequenceFeatures

__all__ = ["assert_matches_definition"]

NUDGES = 4


def assert_matches_definition(
    model: nn.Module,
    features: SequenceFeatures,
    definition: Callable[[SequenceFeatures, dict[str, Tensor]], Tensor],
    *,
    no_gradient: str | None = None,
) -> None:
    """Compare logits and all gradients with those of the definition in float64.

    Two errors bound what is allowed: that of the definition computed in the model's dtype, and,
    lest that be luck, what a rounding of every input does to the exact results, as often as there
    are terms to sum up: in each matrix no more than the longest axis has. In float64, to which no
    better is at hand, the latter alone.

    Args:
        model: The backbone; its dtype is the one that is tested.
        features: Random.
        definition: Logits of features under parameters and buffers by name, in any dtype.
        no_gradient: How the names of parameters end that cancel in a softmax: what is left of
            their gradient is rounding, of terms as large as other gradients are.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    dtype = next(iter(parameters.values())).dtype
    named = {**flat(features), **parameters}
    inputs = {name: tensor.detach().to(dtype) for name, tensor in named.items()}
    cotangent = torch.randn(len(features.candidate)).to(dtype)

    def fast(**tensors: Tensor) -> tuple[Tensor, None]:
        params = {name: tensors[name] for name in parameters}
        return functional_call(model, params, (unflat(tensors, features),)), None

    def slow(**tensors: Tensor) -> tuple[Tensor, None]:
        own = {name: buffer.to(tensors["candidate"].dtype) for name, buffer in buffers.items()}
        return definition(unflat(tensors, features), {**tensors, **own}), None

    exact = {name: tensor.double() for name, tensor in inputs.items()}
    want = value_and_grads(slow, exact, cotangent.double())
    got = value_and_grads(fast, inputs, cotangent)
    plain = want if dtype == torch.float64 else value_and_grads(slow, inputs, cotangent)
    eps = torch.finfo(dtype).eps
    rounded = dict.fromkeys(want, 0.0)
    for _ in range(NUDGES):
        moved = {name: _nudged(tensor, eps) for name, tensor in exact.items()}
        found = value_and_grads(slow, moved, _nudged(cotangent.double(), eps))
        for name, tensor in found.items():
            rounded[name] = max(rounded[name], _error(tensor, want[name]))
    largest = max(float(tensor.abs().max()) for tensor in want.values() if tensor.numel())
    longest = max(size for tensor in inputs.values() for size in tensor.shape)
    sums = of_sums(longest * sum(tensor.dim() > 1 for tensor in parameters.values()))
    for name in want:
        cancels = no_gradient is not None and name.endswith(no_gradient)
        allowed = 2 * _error(plain[name], want[name]) + sums * rounded[name]
        bound = sums * eps * largest if cancels else allowed
        assert _error(got[name], want[name]) <= bound, name


def _nudged(tensor: Tensor, eps: float) -> Tensor:
    return tensor * (1 + eps * torch.randn_like(tensor))


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) if want.numel() else 0.0
