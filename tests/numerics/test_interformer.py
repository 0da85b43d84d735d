"""InterFormer against its equations in float64, values and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.helpers.features import flat, make_features, unflat
from tests.helpers.interformer import Case, definition
from tests.helpers.rounding import value_and_grads
from torchrec_hilomoe.embeddings.features import FeatureWidths, HistoryWidths

SEVERAL = FeatureWidths(
    candidate=16,
    context=11,
    histories=(HistoryWidths(event=16, max_length=4), HistoryWidths(event=8, max_length=2)),
    embedding=8,
    dense=3,
)
ONE = FeatureWidths(
    candidate=8, context=0, histories=(HistoryWidths(event=16, max_length=4),), embedding=8
)
# Of each group: empty rows, full ones, and rows that are longest in one group or in the other.
LENGTHS = ((0, 4, 1, 2, 0), (2, 0, 0, 2, 0))
CASES = [
    (SEVERAL, Case()),
    (SEVERAL, Case(num_layers=2, residual=True)),
    (SEVERAL, Case(gating="self", num_heads=1, cls_tokens=1, recent_tokens=3)),
    (ONE, Case(interaction_layers=2, num_heads=4, pooled_tokens=0)),
    (ONE, Case(num_layers=2, cls_tokens=3, pooled_tokens=1, recent_tokens=0)),
]


def nudged(tensor: Tensor, eps: float) -> Tensor:
    return tensor * (1 + eps * torch.randn_like(tensor))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) if want.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("widths", "case"), CASES, ids=str)
def test_matches_the_definition_in_float64(widths, case, dtype):
    """Float64 itself cannot be asked: FBGEMM pads on CPU in 32 and 16 bits only."""
    model = case.build(widths).to(dtype)
    features = make_features(widths, LENGTHS[: len(widths.histories)])
    inputs = {**flat(features), **dict(model.named_parameters())}
    inputs = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    cotangent = torch.randn(len(LENGTHS[0])).to(dtype)

    def fast(**tensors: Tensor) -> tuple[Tensor, None]:
        params = {name: tensors[name] for name, _ in model.named_parameters()}
        return functional_call(model, params, (unflat(tensors, features),)), None

    def slow(**tensors: Tensor) -> tuple[Tensor, None]:
        return definition(case, unflat(tensors, features), tensors, widths), None

    exact = {name: tensor.double() for name, tensor in inputs.items()}
    want = value_and_grads(slow, exact, cotangent.double())
    plain = value_and_grads(slow, inputs, cotangent)
    got = value_and_grads(fast, inputs, cotangent)
    # What the obvious computation in the same dtype is wrong by, and, lest that be luck, what a
    # rounding of every input does to the exact results, for each of many operations in a row.
    rounded = dict.fromkeys(want, 0.0)
    for _ in range(4):
        nudge = partial(nudged, eps=torch.finfo(dtype).eps)
        moved = {name: nudge(tensor) for name, tensor in exact.items()}
        for name, tensor in value_and_grads(slow, moved, nudge(cotangent.double())).items():
            rounded[name] = max(rounded[name], error(tensor, want[name]))
    for name in want:
        if not name.endswith("pool.key.bias"):  # see the next test
            bound = 4 * error(plain[name], want[name]) + 64 * rounded[name]
            assert error(got[name], want[name]) <= bound, name


@pytest.mark.parametrize(("widths", "case"), CASES, ids=str)
def test_what_is_added_to_every_pooled_key_changes_nothing(widths, case):
    """It cancels in the softmax; so its gradient, all rounding, is left out above."""
    model = case.build(widths)
    features = make_features(widths, LENGTHS[: len(widths.histories)])
    before = model(features)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pool.key.bias"):
                parameter.add_(0.5)
    torch.testing.assert_close(model(features), before, rtol=1e-4, atol=1e-4)
