"""Hidden layers: which, in which order; the head on top of them."""

import re
from typing import cast

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_within, float64_rounding
from torchrec_hilomoe.backbones.layers.batch_norm import GlobalBatchNorm
from torchrec_hilomoe.backbones.layers.mlp import Activation, ACTIVATIONS, Dice, hidden_layers, MLP


def test_each_hidden_layer_is_linear_norm_activation_dropout():
    mlp = MLP(6, (5, 4), activation="dice", dropout=0.1, batch_norm=True)
    once = [nn.Linear, GlobalBatchNorm, Dice, nn.Dropout]
    assert [type(layer) for layer in mlp.hidden] == once * 2
    assert [type(layer) for layer in MLP(6, (5,)).hidden] == [nn.Linear, nn.ReLU]


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_computes_one_number_a_row(hidden):
    mlp, x = MLP(6, hidden).double(), torch.randn(9, 6).double()
    want = x
    for layer in mlp.hidden:
        if isinstance(layer, nn.Linear):
            want = (want @ layer.weight.T + layer.bias).clamp(min=0)
    want = (want @ mlp.output.weight.T + mlp.output.bias)[:, 0]
    assert_within(mlp(x), want, float64_rounding(mlp, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_maps_each_unit_by_itself(activation):
    layers, x = hidden_layers(6, (5,), activation=activation).eval(), torch.randn(9, 6)
    units = layers[0](x)
    moved = layers[1](units)
    assert moved.shape == units.shape
    other = layers[1](units.index_fill(1, torch.tensor([2]), 0.7))
    assert torch.equal(other[:, [0, 1, 3, 4]], moved[:, [0, 1, 3, 4]])


def test_an_impossible_mlp_is_refused():
    with pytest.raises(ValueError, match=re.escape("at least 1, got (5, 0). Correct model.head")):
        MLP(6, (5, 0))
    with pytest.raises(ValueError, match="activation is 'dicey', which is not known. Use one of r"):
        MLP(6, (5,), activation=cast(Activation, "dicey"))
