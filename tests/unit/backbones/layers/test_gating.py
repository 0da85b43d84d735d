"""Both forms of the gate."""

from typing import Any, cast

import pytest
import torch

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.gating import Gate


def test_the_printed_form_is_a_sigmoid_and_the_other_keeps_values():
    x = 3 * torch.randn(2, 3, 5).double()
    printed, kept = Gate(5, "printed").double(), Gate(5, "self").double()
    kept.load_state_dict(printed.state_dict())
    inner, rounding = printed.mlp(x), float64_rounding(printed, x)
    assert_within(printed(x), 1 / (1 + torch.exp(-x * inner)), rounding)
    assert_within(kept(x), x / (1 + torch.exp(-inner)), rounding)


def test_an_unknown_form_is_refused():
    message = r"InterFormer.gating must be 'printed' or 'self', got 'open'."
    with pytest.raises(ValueError, match=message):
        Gate(5, cast(Any, "open"))
