"""InterFormer against its equations in float64, values and every gradient."""

import pytest
import torch
from torch import Tensor

from tests.helpers.definitions import assert_matches_definition
from tests.helpers.features import make_features
from tests.helpers.interformer import Case, definition
from tests.helpers.rounding import assert_within, rounding_of
from torchrec_hilomoe.embeddings.features import FeatureWidths, HistoryWidths, SequenceFeatures

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


DEEP = 1  # of CASES; the longest
IN_DTYPES = [
    pytest.param(*case, dtype, id=f"{number}-{dtype}", marks=[pytest.mark.slow] * slow)
    for number, case in enumerate(CASES)
    for dtype in (torch.float32, torch.bfloat16)
    for slow in [number == DEEP and dtype == torch.bfloat16]
]


@pytest.mark.parametrize(("widths", "case", "dtype"), IN_DTYPES)
def test_matches_the_definition_in_float64(widths, case, dtype):
    """Float64 itself cannot be asked: FBGEMM pads on CPU in 32 and 16 bits only."""

    def defined(features: SequenceFeatures, params: dict[str, Tensor]) -> Tensor:
        return definition(case, features, params, widths)

    assert_matches_definition(
        case.build(widths).to(dtype),
        make_features(widths, LENGTHS[: len(widths.histories)]),
        defined,
        no_gradient="pool.key.bias",  # see the next test
    )


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
    assert_within(model(features), before, rounding_of(model, features))
